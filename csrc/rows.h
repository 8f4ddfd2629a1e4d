// Row-wise building blocks of the elementwise kernels: a row of D channels at a time, fp32 inside.
//
// The build targets a baseline CPU; a row function is compiled for AVX-512, AVX2 and the baseline, and `run` picks one
// while running. A row function is a struct with a static `run<W>(...)`, where W floats fill a vector register.
// Everything it calls is force-inlined, so it is compiled for the same instruction set.
#pragma once

#include "core.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a real call here
#endif
#define UNIWORLD_INLINE inline __attribute__((always_inline))

namespace uniworld {

constexpr int64_t kParallelElements = 16384;  // below this, waking the threads costs more than it gives

// Scratch of this thread, at least `size` floats; it is kept between calls.
inline float* scratch(int64_t size) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

template <int W>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * W)));
  typedef uint32_t Bits __attribute__((vector_size(4 * W)));
  typedef uint16_t Halves __attribute__((vector_size(2 * W)));
};
template <typename V>
constexpr int kWidth = sizeof(V) / sizeof(float);

UNIWORLD_INLINE void load(float& to, const float* from) { to = *from; }
UNIWORLD_INLINE void load(float& to, const bfloat16* from) { to = to_float(*from); }
template <typename V>
UNIWORLD_INLINE void load(V& to, const float* from) {
  std::memcpy(&to, from, sizeof(to));
}
template <typename V>
UNIWORLD_INLINE void load(V& to, const bfloat16* from) {
  using Bits = typename Vector<kWidth<V>>::Bits;
  typename Vector<kWidth<V>>::Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  to = reinterpret_cast<V>(__builtin_convertvector(halves, Bits) << 16);
}

// To bf16: round to nearest even, NaN stays NaN.
UNIWORLD_INLINE void store(float* to, const float& x) { *to = x; }
UNIWORLD_INLINE void store(bfloat16* to, const float& x) { *to = from_float<bfloat16>(x); }
template <typename V>
UNIWORLD_INLINE void store(float* to, const V& x) {
  std::memcpy(to, &x, sizeof(x));
}
template <typename V>
UNIWORLD_INLINE void store(bfloat16* to, const V& x) {
  using Bits = typename Vector<kWidth<V>>::Bits;
  using Halves = typename Vector<kWidth<V>>::Halves;
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits kept = x == x ? rounded : (bits >> 16) | 0x40u;
  const Halves halves = __builtin_convertvector(kept, Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

template <typename V, typename T>
UNIWORLD_INLINE V get(const T* from) {
  V value;
  load(value, from);
  return value;
}

// Calls `body(V(), i, k)` over D channels: V is a vector for channels i..i+W-1, float for the rest; k in 0..3 names the
// accumulator, so that four sums run side by side.
template <int W, typename F>
UNIWORLD_INLINE void for_channels(int64_t D, const F& body) {
  using V = typename Vector<W>::Floats;
  int64_t i = 0;
  for (; i + 4 * W <= D; i += 4 * W) {
    body(V(), i, 0);
    body(V(), i + W, 1);
    body(V(), i + 2 * W, 2);
    body(V(), i + 3 * W, 3);
  }
  for (; i + W <= D; i += W) body(V(), i, 0);
  for (; i < D; ++i) body(0.f, i, 0);
}
#define UNIWORLD_BODY [&](auto zero, int64_t i, [[maybe_unused]] int k) __attribute__((always_inline))

// The sum of a vector's elements, by halves.
template <typename V>
UNIWORLD_INLINE float horizontal_sum(const V& x) {
  if constexpr (kWidth<V> == 4) {
    return (x[0] + x[2]) + (x[1] + x[3]);
  } else {
    using Half = typename Vector<kWidth<V> / 2>::Floats;
    Half halves[2];
    std::memcpy(halves, &x, sizeof(x));
    const Half sum = halves[0] + halves[1];
    return horizontal_sum(sum);
  }
}

template <int W>
struct Sum {
  using V = typename Vector<W>::Floats;
  V vectors[4] = {};
  float rest = 0.f;

  UNIWORLD_INLINE void add(const V& x, int k) { vectors[k] += x; }
  UNIWORLD_INLINE void add(const float& x, int) { rest += x; }
  UNIWORLD_INLINE float total() const {
    const V all = (vectors[0] + vectors[1]) + (vectors[2] + vectors[3]);
    return rest + horizontal_sum(all);
  }
};

struct Moments {
  float mean;
  float rstd;
};

// Mean and reciprocal standard deviation of `row`, in two passes as LayerNorm needs it for rows far from zero.
template <int W>
UNIWORLD_INLINE Moments moments(const float* row, float sum, int64_t D, float eps) {
  const float mean = sum / D;
  Sum<W> squares;
  for_channels<W>(D, UNIWORLD_BODY {
    using V = decltype(zero);
    const V centered = get<V>(row + i) - mean;
    squares.add(centered * centered, k);
  });
  return {mean, 1.f / std::sqrt(squares.total() / D + eps)};
}

// to = (row - mean) * rstd * (1 + scale) + shift
template <int W, typename T>
UNIWORLD_INLINE void modulate_row(const float* row, Moments m, const T* scale, const T* shift, T* to, int64_t D) {
  for_channels<W>(D, UNIWORLD_BODY {
    using V = decltype(zero);
    const V normed = (get<V>(row + i) - m.mean) * m.rstd;
    const V out = normed * (1.f + get<V>(scale + i)) + get<V>(shift + i);
    store(to + i, out);
  });
}

// The gradient of modulate_row with respect to its row is rstd * (grad - mean_grad - normed * mean_dot).
struct NormGradient {
  float mean_grad;
  float mean_dot;
};

// Fills `normed` and `grad`; adds to dscale and dshift.
template <int W, typename T>
UNIWORLD_INLINE NormGradient modulate_row_backward(const T* dout, const T* row, Moments m, const T* scale,
                                                   float* normed, float* grad, float* dscale, float* dshift,
                                                   int64_t D) {
  Sum<W> sum, dot;
  for_channels<W>(D, UNIWORLD_BODY {
    using V = decltype(zero);
    const V d = get<V>(dout + i);
    const V n = (get<V>(row + i) - m.mean) * m.rstd;
    const V g = d * (1.f + get<V>(scale + i));
    const V dscale_sum = get<V>(dscale + i) + d * n;
    const V dshift_sum = get<V>(dshift + i) + d;
    store(normed + i, n);
    store(grad + i, g);
    store(dscale + i, dscale_sum);
    store(dshift + i, dshift_sum);
    sum.add(g, k);
    dot.add(g * n, k);
  });
  return {sum.total() / D, dot.total() / D};
}

// Calls `function(sample, first_row, last_row, block)` for each block of at most `rows` tokens of one sample, in
// parallel. Blocks do not depend on the number of threads, so neither do sums over them.
template <typename F>
void for_each_block(int64_t B, int64_t L, int64_t D, int64_t rows, const F& function) {
  const int64_t blocks = (L + rows - 1) / rows;
#pragma omp parallel for schedule(static) if (B * L * D > kParallelElements)
  for (int64_t task = 0; task < B * blocks; ++task) {
    const int64_t sample = task / blocks, block = task % blocks;
    function(sample, block * rows, std::min((block + 1) * rows, L), task);
  }
}

// 2 AVX-512, 1 AVX2, 0 the baseline.
inline int widest_instruction_set() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512f") ? 2 : __builtin_cpu_supports("avx2") ? 1 : 0;
#else
  return 0;
#endif
}

// The one in use: the widest, unless a test lowered it.
inline int& instruction_set() {
  static int level = widest_instruction_set();
  return level;
}

#ifdef __x86_64__
template <typename Row, typename... Arguments>
__attribute__((target("avx512f"))) auto run_avx512(Arguments... arguments) {
  return Row::template run<16>(arguments...);
}
template <typename Row, typename... Arguments>
__attribute__((target("avx2"))) auto run_avx2(Arguments... arguments) {
  return Row::template run<8>(arguments...);
}
#endif

// Calls `Row::run` compiled for the widest instruction set.
template <typename Row, typename... Arguments>
auto run(Arguments... arguments) {
#ifdef __x86_64__
  if (instruction_set() == 2) return run_avx512<Row>(arguments...);
  if (instruction_set() == 1) return run_avx2<Row>(arguments...);
#endif
  return Row::template run<4>(arguments...);
}

// Calls `function` with a null pointer of the element type that `dtype` names.
template <typename F>
void with_dtype(int dtype, const F& function) {
  if (dtype == static_cast<int>(DType::kBFloat16)) {
    function(static_cast<bfloat16*>(nullptr));
  } else {
    function(static_cast<float*>(nullptr));
  }
}

}  // namespace uniworld
