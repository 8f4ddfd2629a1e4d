// adaln_modulate on the CPU. Letters: B batch, L tokens, D channels.
#include "rows.h"

namespace uniworld {
namespace {

constexpr int64_t kRows = 16;  // tokens a task of the forward pass

struct Forward {
  template <int W, typename T>
  static UNIWORLD_INLINE Moments run(const T* x, const T* scale, const T* shift, T* y, float* row, int64_t D,
                                     float eps) {
    Sum<W> sum;
    for_channels<W>(D, UNIWORLD_BODY {
      const auto value = get<decltype(zero)>(x + i);
      store(row + i, value);
      sum.add(value, k);
    });
    const Moments m = moments<W>(row, sum.total(), D, eps);
    modulate_row<W>(row, m, scale, shift, y, D);
    return m;
  }
};

struct Backward {
  template <int W, typename T>
  static UNIWORLD_INLINE void run(const T* dy, const T* x, Moments m, const T* scale, T* dx, float* rows, float* dscale,
                                  float* dshift, int64_t D) {
    float *normed = rows, *grad = rows + D;
    const NormGradient g = modulate_row_backward<W>(dy, x, m, scale, normed, grad, dscale, dshift, D);
    for_channels<W>(D, UNIWORLD_BODY {
      using V = decltype(zero);
      const V d = m.rstd * (get<V>(grad + i) - g.mean_grad - get<V>(normed + i) * g.mean_dot);
      store(dx + i, d);
    });
  }
};

// x, y: [B, L, D]; scale, shift: [B, D] with row strides; mean, rstd: [B, L] fp32.
void adaln_modulate(int dtype, uintptr_t x, uintptr_t scale, int64_t scale_stride, uintptr_t shift,
                    int64_t shift_stride, uintptr_t y, uintptr_t mean, uintptr_t rstd, int64_t B, int64_t L, int64_t D,
                    float eps) {
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_block(B, L, D, kRows, [&](int64_t sample, int64_t first, int64_t last, int64_t) {
      float* row = scratch(D);
      const T* sample_scale = pointer<T>(scale) + sample * scale_stride;
      const T* sample_shift = pointer<T>(shift) + sample * shift_stride;
      for (int64_t r = sample * L + first; r < sample * L + last; ++r) {
        const Moments m =
            run<Forward>(pointer<T>(x) + r * D, sample_scale, sample_shift, pointer<T>(y) + r * D, row, D, eps);
        pointer<float>(mean)[r] = m.mean;
        pointer<float>(rstd)[r] = m.rstd;
      }
    });
  });
}

// dy, x, dx: [B, L, D]; dscale, dshift: [B, ceil(L / rows), D] fp32 partial sums, overwritten.
void adaln_modulate_backward(int dtype, uintptr_t dy, uintptr_t x, uintptr_t scale, int64_t scale_stride,
                             uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dscale, uintptr_t dshift,
                             int64_t B, int64_t L, int64_t D, int64_t rows) {
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_block(B, L, D, rows, [&](int64_t sample, int64_t first, int64_t last, int64_t block) {
      float* buffers = scratch(2 * D);
      float *dscale_row = pointer<float>(dscale) + block * D, *dshift_row = pointer<float>(dshift) + block * D;
      std::fill_n(dscale_row, D, 0.f);
      std::fill_n(dshift_row, D, 0.f);
      for (int64_t r = sample * L + first; r < sample * L + last; ++r) {
        const Moments m{pointer<float>(mean)[r], pointer<float>(rstd)[r]};
        run<Backward>(pointer<T>(dy) + r * D, pointer<T>(x) + r * D, m, pointer<T>(scale) + sample * scale_stride,
                      pointer<T>(dx) + r * D, buffers, dscale_row, dshift_row, D);
      }
    });
  });
}

}  // namespace

void bind_adaln_modulate(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("adaln_modulate", &adaln_modulate, release());
  m.def("adaln_modulate_backward", &adaln_modulate_backward, release());
}

}  // namespace uniworld
