// Row-wise building blocks of the elementwise kernels: a row of D channels at a time, fp32 inside.
//
// The build targets a baseline CPU. A row function marked UNIWORLD_CLONES is compiled for AVX-512, AVX2 and the
// baseline, and the loader picks one; everything it calls is force-inlined, so it is compiled for the same target.
#pragma once

#include "core.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)  // the loader must know how to pick
#define UNIWORLD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define UNIWORLD_CLONES
#endif
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

// Sixteen floats: one AVX-512 register, two of AVX2, four of the baseline.
typedef float Lanes __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef uint32_t LaneBits __attribute__((vector_size(64)));
typedef uint16_t LaneHalves __attribute__((vector_size(32)));
constexpr int64_t kLanes = 16;

UNIWORLD_INLINE void load(float& to, const float* from) { to = *from; }
UNIWORLD_INLINE void load(Lanes& to, const float* from) { std::memcpy(&to, from, sizeof(to)); }
UNIWORLD_INLINE void load(float& to, const bfloat16* from) {
  const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
  std::memcpy(&to, &bits, sizeof(to));
}
UNIWORLD_INLINE void load(Lanes& to, const bfloat16* from) {
  LaneHalves halves;
  std::memcpy(&halves, from, sizeof(halves));
  to = reinterpret_cast<Lanes>(__builtin_convertvector(halves, LaneBits) << 16);
}

// To bf16: round to nearest even, NaN stays NaN.
UNIWORLD_INLINE void store(float* to, const float& x) { *to = x; }
UNIWORLD_INLINE void store(float* to, const Lanes& x) { std::memcpy(to, &x, sizeof(x)); }
UNIWORLD_INLINE void store(bfloat16* to, const float& x) { *to = from_float<bfloat16>(x); }
UNIWORLD_INLINE void store(bfloat16* to, const Lanes& x) {
  const LaneBits bits = reinterpret_cast<LaneBits>(x);
  const LaneBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const LaneBits kept = x == x ? rounded : (bits >> 16) | 0x40u;
  const LaneHalves halves = __builtin_convertvector(kept, LaneHalves);
  std::memcpy(to, &halves, sizeof(halves));
}

template <typename V, typename T>
UNIWORLD_INLINE V get(const T* from) {
  V value;
  load(value, from);
  return value;
}

// Calls `body(V(), i, k)` over D channels: V is Lanes for channels i..i+15, float for the rest; k in 0..3 names the
// accumulator, so that four sums run side by side.
template <typename F>
UNIWORLD_INLINE void for_channels(int64_t D, const F& body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= D; i += 4 * kLanes) {
    body(Lanes(), i, 0);
    body(Lanes(), i + kLanes, 1);
    body(Lanes(), i + 2 * kLanes, 2);
    body(Lanes(), i + 3 * kLanes, 3);
  }
  for (; i + kLanes <= D; i += kLanes) body(Lanes(), i, 0);
  for (; i < D; ++i) body(0.f, i, 0);
}
#define UNIWORLD_BODY [&](auto zero, int64_t i, [[maybe_unused]] int k) __attribute__((always_inline))

struct Sum {
  Lanes lanes[4] = {};
  float rest = 0.f;

  UNIWORLD_INLINE void add(const Lanes& x, int k) { lanes[k] += x; }
  UNIWORLD_INLINE void add(const float& x, int) { rest += x; }
  UNIWORLD_INLINE float total() const {
    const Lanes all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    Eight eights[2];
    std::memcpy(eights, &all, sizeof(all));
    eights[0] += eights[1];
    Four fours[2];
    std::memcpy(fours, eights, sizeof(fours));
    const Four four = fours[0] + fours[1];
    return rest + ((four[0] + four[2]) + (four[1] + four[3]));
  }
};

struct Moments {
  float mean;
  float rstd;
};

// Mean and reciprocal standard deviation of `row`, in two passes as LayerNorm needs it for rows far from zero.
UNIWORLD_INLINE Moments moments(const float* row, float sum, int64_t D, float eps) {
  const float mean = sum / D;
  Sum squares;
  for_channels(D, UNIWORLD_BODY {
    using V = decltype(zero);
    const V centered = get<V>(row + i) - mean;
    squares.add(centered * centered, k);
  });
  return {mean, 1.f / std::sqrt(squares.total() / D + eps)};
}

// to = (row - mean) * rstd * (1 + scale) + shift
template <typename T>
UNIWORLD_INLINE void modulate_row(const float* row, Moments m, const T* scale, const T* shift, T* to, int64_t D) {
  for_channels(D, UNIWORLD_BODY {
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
template <typename T>
UNIWORLD_INLINE NormGradient modulate_row_backward(const T* dout, const T* row, Moments m, const T* scale, float* normed,
                                                   float* grad, float* dscale, float* dshift, int64_t D) {
  Sum sum, dot;
  for_channels(D, UNIWORLD_BODY {
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
