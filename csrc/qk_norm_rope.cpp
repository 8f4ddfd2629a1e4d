// qk_norm_rope on the CPU. Letters: B batch, L tokens of this stream, S tokens of the joint sequence, H heads,
// Dh channels of a head, R rotated rows.
#include "rows.h"

namespace uniworld {
namespace {

constexpr int64_t kRows = 16;  // tokens a task of the forward pass

// One token: q, k and v lie in `qkv` one after another; cos and sin are null where it is not rotated, v to leave it.
template <typename T>
struct Token {
  const T* qkv;
  const float *q_weight, *k_weight, *cos, *sin;
  T *q, *k, *v;
};

template <typename T>
struct TokenGradient {
  const T *dq, *dk, *dv, *qkv;
  const float *q_weight, *k_weight, *cos, *sin;
  T* dqkv;
  float *dq_weight, *dk_weight;
};

#ifdef __clang__
#define UNIWORLD_SWAP(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define UNIWORLD_SWAP(x, ...) __builtin_shuffle(x, typename Vector<kWidth<V>>::Bits{__VA_ARGS__})
#endif

template <typename V>
UNIWORLD_INLINE V swap_pairs(const V& x) {
  if constexpr (kWidth<V> == 16) {
    return UNIWORLD_SWAP(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  } else if constexpr (kWidth<V> == 8) {
    return UNIWORLD_SWAP(x, 1, 0, 3, 2, 5, 4, 7, 6);
  } else {
    return UNIWORLD_SWAP(x, 1, 0, 3, 2);
  }
}

// The other channel of each rotated pair.
template <typename V, typename T>
UNIWORLD_INLINE V partner(const T* row, int64_t i) {
  if constexpr (std::is_same_v<V, float>) {
    return get<float>(row + (i ^ 1));
  } else {
    return swap_pairs(get<V>(row + i));
  }
}

// With the weight folded into the rotation: out[i] = rstd * (x[i] * direct[i] + partner(x)[i] * crossed[i]).
UNIWORLD_INLINE void fold(const float* weight, const float* cos, const float* sin, float* direct, float* crossed,
                          int64_t Dh) {
  for (int64_t i = 0; i < Dh; i += 2) {
    const float c = cos[i / 2], s = sin[i / 2], even = weight[i], odd = weight[i + 1];
    direct[i] = even * c;
    direct[i + 1] = odd * c;
    crossed[i] = -odd * s;
    crossed[i + 1] = even * s;
  }
}

template <int W, typename T>
UNIWORLD_INLINE void forward_head(const T* x, const float* direct, const float* crossed, T* out, float* row, int64_t Dh,
                                  float eps) {
  Sum<W> squares;
  for_channels<W>(Dh, UNIWORLD_BODY {
    const auto value = get<decltype(zero)>(x + i);
    store(row + i, value);
    squares.add(value * value, k);
  });
  const float rstd = 1.f / std::sqrt(squares.total() / Dh + eps);
  for_channels<W>(Dh, UNIWORLD_BODY {
    using V = decltype(zero);
    V value = get<V>(row + i) * get<V>(direct + i);
    if (crossed) value += partner<V>(row, i) * get<V>(crossed + i);
    value *= rstd;
    store(out + i, value);
  });
}

struct Forward {
  template <int W, typename T>
  static UNIWORLD_INLINE void run(const Token<T>& t, float* buffers, int64_t H, int64_t Dh, float eps) {
    float* row = buffers;
    const float* weights[2] = {t.q_weight, t.k_weight};
    T* outs[2] = {t.q, t.k};
    for (int part = 0; part < 2; ++part) {
      const float *direct = weights[part], *crossed = nullptr;
      if (t.cos) {
        fold(weights[part], t.cos, t.sin, buffers + Dh, buffers + 2 * Dh, Dh);
        direct = buffers + Dh;
        crossed = buffers + 2 * Dh;
      }
      const T* x = t.qkv + part * H * Dh;
      for (int64_t h = 0; h < H; ++h) forward_head<W>(x + h * Dh, direct, crossed, outs[part] + h * Dh, row, Dh, eps);
    }
    if (t.v) std::memcpy(static_cast<void*>(t.v), t.qkv + 2 * H * Dh, H * Dh * sizeof(T));
  }
};

// d = dy rotated back: d[i] = dy[i] * direct[i] + partner(dy)[i] * crossed[i].
template <int W, typename T>
UNIWORLD_INLINE void backward_head(const T* dy, const T* x, const float* weight, const float* direct,
                                   const float* crossed, T* dx, float* dweight, float* buffers, int64_t Dh, float eps) {
  float *normed = buffers, *grad = buffers + Dh;
  Sum<W> squares, dot;
  for_channels<W>(Dh, UNIWORLD_BODY {
    const auto value = get<decltype(zero)>(x + i);
    squares.add(value * value, k);
  });
  const float rstd = 1.f / std::sqrt(squares.total() / Dh + eps);
  for_channels<W>(Dh, UNIWORLD_BODY {
    using V = decltype(zero);
    V d = get<V>(dy + i);
    if (crossed) d = d * get<V>(direct + i) + partner<V>(dy, i) * get<V>(crossed + i);
    const V n = get<V>(x + i) * rstd;
    const V g = d * get<V>(weight + i);
    const V dweight_sum = get<V>(dweight + i) + d * n;
    store(dweight + i, dweight_sum);
    store(normed + i, n);
    store(grad + i, g);
    dot.add(g * n, k);
  });
  const float mean_dot = dot.total() / Dh;
  for_channels<W>(Dh, UNIWORLD_BODY {
    using V = decltype(zero);
    const V d = rstd * (get<V>(grad + i) - get<V>(normed + i) * mean_dot);
    store(dx + i, d);
  });
}

struct Backward {
  template <int W, typename T>
  static UNIWORLD_INLINE void run(const TokenGradient<T>& t, float* buffers, int64_t H, int64_t Dh, float eps) {
    const float *direct = nullptr, *crossed = nullptr;
    if (t.cos) {
      for (int64_t i = 0; i < Dh; ++i) {
        buffers[i] = t.cos[i / 2];
        buffers[Dh + i] = i % 2 ? -t.sin[i / 2] : t.sin[i / 2];
      }
      direct = buffers;
      crossed = buffers + Dh;
    }
    const T* dys[2] = {t.dq, t.dk};
    const float* weights[2] = {t.q_weight, t.k_weight};
    float* dweights[2] = {t.dq_weight, t.dk_weight};
    for (int part = 0; part < 2; ++part) {
      for (int64_t h = 0; h < H; ++h) {
        const int64_t at = (part * H + h) * Dh;
        backward_head<W>(dys[part] + h * Dh, t.qkv + at, weights[part], direct, crossed, t.dqkv + at, dweights[part],
                         buffers + 2 * Dh, Dh, eps);
      }
    }
    std::memcpy(static_cast<void*>(t.dqkv + 2 * H * Dh), t.dv, H * Dh * sizeof(T));
  }
};

// The table row of a token, or null from row R on.
const float* table_row(uintptr_t table, int64_t token, int64_t R, int64_t Dh) {
  return token < R ? pointer<float>(table) + token * (Dh / 2) : nullptr;
}

// qkv: [B, L, 3 * H * Dh] with batch and row strides; weights: [Dh] fp32; cos, sin: [R, Dh / 2] fp32;
// q, k, v: [B, S, H, Dh], of which rows offset..offset + L are written (v may be null).
void qk_norm_rope(int dtype, uintptr_t qkv, int64_t batch_stride, int64_t row_stride, uintptr_t q_weight,
                  uintptr_t k_weight, uintptr_t cos, uintptr_t sin, int64_t R, uintptr_t q, uintptr_t k, uintptr_t v,
                  int64_t B, int64_t L, int64_t S, int64_t offset, int64_t H, int64_t Dh, float eps) {
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_block(B, L, 3 * H * Dh, kRows, [&](int64_t sample, int64_t first, int64_t last, int64_t) {
      float* buffers = scratch(3 * Dh);
      for (int64_t token = first; token < last; ++token) {
        const int64_t joint = (sample * S + offset + token) * H * Dh;
        const Token<T> t{pointer<T>(qkv) + sample * batch_stride + token * row_stride,
                         pointer<float>(q_weight),
                         pointer<float>(k_weight),
                         table_row(cos, token, R, Dh),
                         table_row(sin, token, R, Dh),
                         pointer<T>(q) + joint,
                         pointer<T>(k) + joint,
                         v ? pointer<T>(v) + joint : nullptr};
        run<Forward>(t, buffers, H, Dh, eps);
      }
    });
  });
}

// dq, dk, dv: [B, S, H, Dh]; dqkv: [B, L, 3 * H * Dh]; weight gradients: [B * ceil(L / rows), Dh] fp32 partial sums.
void qk_norm_rope_backward(int dtype, uintptr_t dq, uintptr_t dk, uintptr_t dv, uintptr_t qkv, int64_t batch_stride,
                           int64_t row_stride, uintptr_t q_weight, uintptr_t k_weight, uintptr_t cos, uintptr_t sin,
                           int64_t R, uintptr_t dqkv, uintptr_t dq_weight, uintptr_t dk_weight, int64_t B, int64_t L,
                           int64_t S, int64_t offset, int64_t H, int64_t Dh, int64_t rows, float eps) {
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_block(B, L, 3 * H * Dh, rows, [&](int64_t sample, int64_t first, int64_t last, int64_t block) {
      float* buffers = scratch(4 * Dh);
      for (uintptr_t sums : {dq_weight, dk_weight}) std::fill_n(pointer<float>(sums) + block * Dh, Dh, 0.f);
      for (int64_t token = first; token < last; ++token) {
        const int64_t joint = (sample * S + offset + token) * H * Dh;
        const TokenGradient<T> t{pointer<T>(dq) + joint,
                                 pointer<T>(dk) + joint,
                                 pointer<T>(dv) + joint,
                                 pointer<T>(qkv) + sample * batch_stride + token * row_stride,
                                 pointer<float>(q_weight),
                                 pointer<float>(k_weight),
                                 table_row(cos, token, R, Dh),
                                 table_row(sin, token, R, Dh),
                                 pointer<T>(dqkv) + (sample * L + token) * 3 * H * Dh,
                                 pointer<float>(dq_weight) + block * Dh,
                                 pointer<float>(dk_weight) + block * Dh};
        run<Backward>(t, buffers, H, Dh, eps);
      }
    });
  });
}

}  // namespace

void bind_qk_norm_rope(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("qk_norm_rope", &qk_norm_rope, release());
  m.def("qk_norm_rope_backward", &qk_norm_rope_backward, release());
}

}  // namespace uniworld
