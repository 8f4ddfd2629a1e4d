// Attention in bf16 on CPUs with AVX512-BF16: operands in the order that vdpbf16ps reads, a register tile, 2^x.
//
// A product is of a left operand, rows of pairs, with a packed right one. A "pair" is two neighbouring bf16 of the
// summed dimension in 32 bits, as vdpbf16ps takes them. Letters: B batch, S tokens, H heads, Dh channels of a head.
#pragma once

#include "rows.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define UNIWORLD_ATTENTION_BF16
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#endif
#include <immintrin.h>

#include <cfloat>
#define UNIWORLD_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace uniworld {

constexpr int kRows = 6;       // of a register tile: 24 sums, 4 vectors on the right, 1 on the left
constexpr int kLanes = 16;     // 32-bit lanes of a vector
constexpr int64_t kTile = 64;  // columns of a register tile
constexpr int64_t kMaxChannels = 256;
constexpr int64_t kPairs = 144;  // from row to row of the left operand: 128, and 16 that spread rows over the L1 cache

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// [B, S, H, Dh] with strides in elements, channels contiguous.
struct Strided {
  const bfloat16* data;
  int64_t batch, token, head;

  const bfloat16* row(int64_t b, int64_t s, int64_t h) const { return data + b * batch + s * token + h * head; }
};

UNIWORLD_BF16 UNIWORLD_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= kLanes ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(n, 0)) - 1);
}

// Transposes 16 vectors of 16 lanes.
UNIWORLD_BF16 UNIWORLD_INLINE void transpose(__m512i (&x)[kLanes]) {
  __m512i y[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {  // x[4 g + i] holds column 4 l + i of rows 4 g.. in its 128-bit lane l
    const __m512i a = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88), b = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd), d = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    y[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    y[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
    y[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88);
    y[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) x[i] = y[i];
}

// A packed operand of a head, in pairs.
inline int64_t packed_size(int64_t S, int64_t Dh) { return round_up(S, kTile) * Dh / 2; }

// Sums over channels: tokens first..first + 63 as columns, as far as there are, with zeros up to the next multiple of
// 16. Tiles of 64 tokens, [Dh / 2, 64] pairs each; the last is as many vectors wide as it needs.
UNIWORLD_BF16 inline void pack_tokens(const Strided& x, int64_t b, int64_t h, int64_t first, int64_t length, int64_t Dh,
                                      uint32_t* packed) {
  const int64_t rest = length - first, width = std::min(kTile, round_up(rest, kLanes));
  uint32_t* tile = packed + first * Dh / 2;
  for (int64_t token = 0; token < width; token += kLanes) {
    for (int64_t pair = 0; pair < Dh / 2; pair += kLanes) {
      __m512i vectors[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        vectors[i] =
            token + i < rest ? _mm512_loadu_si512(x.row(b, first + token + i, h) + 2 * pair) : _mm512_setzero_si512();
      }
      transpose(vectors);
      for (int i = 0; i < kLanes; ++i) _mm512_store_si512(tile + (pair + i) * width + token, vectors[i]);
    }
  }
}

// Sums over tokens: tokens first..first + 63, as far as there are; the last of an odd number is paired with zeros.
// Tiles of 64 channels (the last may be 32), [S / 2, 64] pairs each.
UNIWORLD_BF16 inline void pack_channels(const Strided& x, int64_t b, int64_t h, int64_t first, int64_t length,
                                        int64_t Dh, uint32_t* packed) {
  const int64_t last = std::min(first + kTile, length);
  __m512i lower, upper;  // where the words of two rows go: 0..31 are the first row's, 32..63 the second's
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = static_cast<uint16_t>(i / 2 + 32 * (i % 2));
  lower = _mm512_load_si512(order);
  upper = _mm512_load_si512(order + 32);
  for (int64_t channel = 0; channel < Dh; channel += 32) {
    const int64_t tile = channel / kTile * kTile, width = std::min(kTile, Dh - tile);
    uint32_t* to = packed + tile * round_up(length, 2) / 2 + first / 2 * width + channel - tile;
    for (int64_t row = first; row < last; row += 2, to += width) {
      const __m512i even = _mm512_loadu_si512(x.row(b, row, h) + channel);
      const __m512i odd =
          row + 1 < length ? _mm512_loadu_si512(x.row(b, row + 1, h) + channel) : _mm512_setzero_si512();
      _mm512_store_si512(to, _mm512_permutex2var_epi16(even, lower, odd));
      _mm512_store_si512(to + kLanes, _mm512_permutex2var_epi16(even, upper, odd));
    }
  }
}

// Tokens first..first + rows - 1 of a head as a left operand, with rows of zeros up to `padded`.
inline void copy_rows(const Strided& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t padded, int64_t Dh,
                      uint32_t* to) {
  for (int64_t r = 0; r < padded; ++r) {
    if (r < rows) std::memcpy(to + r * kPairs, x.row(b, first + r, h), Dh * sizeof(bfloat16));
    else std::memset(to + r * kPairs, 0, Dh * sizeof(bfloat16));
  }
}

// factor * from, [Dh] fp32 to bf16.
UNIWORLD_BF16 inline void write_row(const float* from, float scale, bfloat16* to, int64_t Dh) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < Dh; i += 2 * kLanes) {
    const __m512 low = _mm512_mul_ps(_mm512_load_ps(from + i), factor);
    const __m512 high = _mm512_mul_ps(_mm512_load_ps(from + i + kLanes), factor);
    _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// to = left right, or decay * to + left right where `decay` has a factor a row. left: kRows rows, kPairs apart, of
// `steps` pairs; right: [steps, 16 V] pairs; to: [kRows, 16 V] fp32 with `stride`.
template <int V, bool kDecay>
UNIWORLD_BF16 inline void multiply(const uint32_t* left, const uint32_t* right, int64_t steps, float* to,
                                   int64_t stride, const float* decay) {
  __m512 sums[kRows][V];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      sums[r][j] = kDecay ? _mm512_mul_ps(_mm512_load_ps(to + r * stride + j * kLanes), _mm512_set1_ps(decay[r]))
                          : _mm512_setzero_ps();
    }
  }
  for (int64_t step = 0; step < steps; ++step, right += V * kLanes) {
    __m512i vectors[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) vectors[j] = _mm512_load_si512(right + j * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(left[r * kPairs + step]));
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], (__m512bh)pair, (__m512bh)vectors[j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) _mm512_store_ps(to + r * stride + j * kLanes, sums[r][j]);
  }
}

// The same for `rows` rows and V = columns / 16 in 1..4.
template <bool kDecay>
UNIWORLD_BF16 inline void multiply_rows(int64_t rows, int64_t columns, const uint32_t* left, const uint32_t* right,
                                 int64_t steps, float* to, int64_t stride, const float* decay) {
  const int V = static_cast<int>(columns / kLanes);
  const auto tile = V == 4   ? multiply<4, kDecay>
                    : V == 3 ? multiply<3, kDecay>
                    : V == 2 ? multiply<2, kDecay>
                             : multiply<1, kDecay>;
  for (int64_t r = 0; r < rows; r += kRows) tile(left + r * kPairs, right, steps, to + r * stride, stride, decay + r);
}

// 2^x to 3e-6 of itself (bf16 keeps 4e-3); 1 at 0, 2^-126 below -126, NaN stays.
UNIWORLD_BF16 UNIWORLD_INLINE __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.00958285317f), part, _mm512_set1_ps(0.0559064250f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.240240986f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.693124193f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(y, whole);
}

// 64-byte aligned memory of this thread for a T, kept between calls.
template <typename T>
T& thread_buffers() {
  const auto address = reinterpret_cast<uintptr_t>(scratch((sizeof(T) + 64) / sizeof(float)));
  return *reinterpret_cast<T*>((address + 63) / 64 * 64);
}

}  // namespace uniworld
#endif
