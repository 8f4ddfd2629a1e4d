// gate_residual and gate_residual_adaln on the CPU. Letters: B batch, L tokens, D channels.
#include "rows.h"

namespace uniworld {
namespace {

constexpr int64_t kRows = 16;  // tokens a task of the forward passes

struct Gate {
  template <int W, typename T>
  static UNIWORLD_INLINE void run(const T* x, const T* y, const T* gate, T* out, int64_t D) {
    for_channels<W>(D, UNIWORLD_BODY {
      using V = decltype(zero);
      const V sum = get<V>(x + i) + get<V>(gate + i) * get<V>(y + i);
      store(out + i, sum);
    });
  }
};

struct GateBackward {
  template <int W, typename T>
  static UNIWORLD_INLINE void run(const T* dout, const T* y, const T* gate, T* dy, float* dgate, int64_t D) {
    for_channels<W>(D, UNIWORLD_BODY {
      using V = decltype(zero);
      const V d = get<V>(dout + i);
      const V branch = d * get<V>(gate + i);
      const V sum = get<V>(dgate + i) + d * get<V>(y + i);
      store(dy + i, branch);
      store(dgate + i, sum);
    });
  }
};

// What one token of gate_residual_adaln reads and writes.
template <typename T>
struct Token {
  const T *x, *y, *gate, *scale, *shift;
  T *residual, *modulated;
};

// The same for its gradient: dx and dy are written, dgate, dscale and dshift added to.
template <typename T>
struct TokenGradient {
  const T *dresidual, *dmodulated, *residual, *y, *gate, *scale;
  T *dx, *dy;
  float *dgate, *dscale, *dshift;
};

struct GateAdaln {
  template <int W, typename T>
  static UNIWORLD_INLINE Moments run(const Token<T>& t, float* row, int64_t D, float eps) {
    Sum<W> sum;
    for_channels<W>(D, UNIWORLD_BODY {
      using V = decltype(zero);
      const V r = get<V>(t.x + i) + get<V>(t.gate + i) * get<V>(t.y + i);
      store(t.residual + i, r);
      store(row + i, r);
      sum.add(r, k);
    });
    const Moments m = moments<W>(row, sum.total(), D, eps);
    modulate_row<W>(row, m, t.scale, t.shift, t.modulated, D);
    return m;
  }
};

struct GateAdalnBackward {
  template <int W, typename T>
  static UNIWORLD_INLINE void run(const TokenGradient<T>& t, Moments m, float* rows, int64_t D) {
    float *normed = rows, *grad = rows + D;
    const NormGradient g =
        modulate_row_backward<W>(t.dmodulated, t.residual, m, t.scale, normed, grad, t.dscale, t.dshift, D);
    for_channels<W>(D, UNIWORLD_BODY {
      using V = decltype(zero);
      const V through_norm = m.rstd * (get<V>(grad + i) - g.mean_grad - get<V>(normed + i) * g.mean_dot);
      const V d = get<V>(t.dresidual + i) + through_norm;
      const V branch = d * get<V>(t.gate + i);
      const V dgate = get<V>(t.dgate + i) + d * get<V>(t.y + i);
      store(t.dx + i, d);
      store(t.dy + i, branch);
      store(t.dgate + i, dgate);
    });
  }
};

// x, y, out: [B, L, D]; gate: [B, D] with a row stride.
void gate_residual(int dtype, uintptr_t x, uintptr_t y, uintptr_t gate, int64_t gate_stride, uintptr_t out, int64_t B,
                   int64_t L, int64_t D) {
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_block(B, L, D, kRows, [&](int64_t sample, int64_t first, int64_t last, int64_t) {
      const T* sample_gate = pointer<T>(gate) + sample * gate_stride;
      for (int64_t r = (sample * L + first) * D; r < (sample * L + last) * D; r += D) {
        run<Gate>(pointer<T>(x) + r, pointer<T>(y) + r, sample_gate, pointer<T>(out) + r, D);
      }
    });
  });
}

// dout, y, dy: [B, L, D]; dgate: [B, ceil(L / rows), D] fp32 partial sums, overwritten.
void gate_residual_backward(int dtype, uintptr_t dout, uintptr_t y, uintptr_t gate, int64_t gate_stride, uintptr_t dy,
                            uintptr_t dgate, int64_t B, int64_t L, int64_t D, int64_t rows) {
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_block(B, L, D, rows, [&](int64_t sample, int64_t first, int64_t last, int64_t block) {
      const T* sample_gate = pointer<T>(gate) + sample * gate_stride;
      float* dgate_row = pointer<float>(dgate) + block * D;
      std::fill_n(dgate_row, D, 0.f);
      for (int64_t r = (sample * L + first) * D; r < (sample * L + last) * D; r += D) {
        run<GateBackward>(pointer<T>(dout) + r, pointer<T>(y) + r, sample_gate, pointer<T>(dy) + r, dgate_row, D);
      }
    });
  });
}

// x, y, residual, modulated: [B, L, D]; gate, scale, shift: [B, D] with row strides; mean, rstd: [B, L] fp32.
void gate_residual_adaln(int dtype, uintptr_t x, uintptr_t y, uintptr_t gate, int64_t gate_stride, uintptr_t scale,
                         int64_t scale_stride, uintptr_t shift, int64_t shift_stride, uintptr_t residual,
                         uintptr_t modulated, uintptr_t mean, uintptr_t rstd, int64_t B, int64_t L, int64_t D,
                         float eps) {
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_block(B, L, D, kRows, [&](int64_t sample, int64_t first, int64_t last, int64_t) {
      float* row = scratch(D);
      for (int64_t r = sample * L + first; r < sample * L + last; ++r) {
        const Token<T> token{pointer<T>(x) + r * D,
                             pointer<T>(y) + r * D,
                             pointer<T>(gate) + sample * gate_stride,
                             pointer<T>(scale) + sample * scale_stride,
                             pointer<T>(shift) + sample * shift_stride,
                             pointer<T>(residual) + r * D,
                             pointer<T>(modulated) + r * D};
        const Moments m = run<GateAdaln>(token, row, D, eps);
        pointer<float>(mean)[r] = m.mean;
        pointer<float>(rstd)[r] = m.rstd;
      }
    });
  });
}

// dgate, dscale, dshift: [B, ceil(L / rows), D] fp32 partial sums, overwritten.
void gate_residual_adaln_backward(int dtype, uintptr_t dresidual, uintptr_t dmodulated, uintptr_t residual, uintptr_t y,
                                  uintptr_t gate, int64_t gate_stride, uintptr_t scale, int64_t scale_stride,
                                  uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dy, uintptr_t dgate,
                                  uintptr_t dscale, uintptr_t dshift, int64_t B, int64_t L, int64_t D, int64_t rows) {
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_block(B, L, D, rows, [&](int64_t sample, int64_t first, int64_t last, int64_t block) {
      float* buffers = scratch(2 * D);
      for (uintptr_t sums : {dgate, dscale, dshift}) std::fill_n(pointer<float>(sums) + block * D, D, 0.f);
      for (int64_t r = sample * L + first; r < sample * L + last; ++r) {
        const TokenGradient<T> token{pointer<T>(dresidual) + r * D,
                                     pointer<T>(dmodulated) + r * D,
                                     pointer<T>(residual) + r * D,
                                     pointer<T>(y) + r * D,
                                     pointer<T>(gate) + sample * gate_stride,
                                     pointer<T>(scale) + sample * scale_stride,
                                     pointer<T>(dx) + r * D,
                                     pointer<T>(dy) + r * D,
                                     pointer<float>(dgate) + block * D,
                                     pointer<float>(dscale) + block * D,
                                     pointer<float>(dshift) + block * D};
        run<GateAdalnBackward>(token, Moments{pointer<float>(mean)[r], pointer<float>(rstd)[r]}, buffers, D);
      }
    });
  });
}

}  // namespace

void bind_gate_residual(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("gate_residual", &gate_residual, release());
  m.def("gate_residual_backward", &gate_residual_backward, release());
  m.def("gate_residual_adaln", &gate_residual_adaln, release());
  m.def("gate_residual_adaln_backward", &gate_residual_adaln_backward, release());
}

}  // namespace uniworld
