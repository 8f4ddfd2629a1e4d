// Attention forward in bf16 on CPUs with AVX512-BF16: vdpbf16ps, online softmax, fp32 inside.
//
// Keys and values are packed once, so that a register tile of 6 rows by 4 vectors reads its right operand in order.
// Then each task takes 48 queries of one head past all keys, 256 at a time. Letters: B batch, S tokens, H heads, Dh
// channels of a head. A "pair" is two neighbouring bf16 of the summed dimension in 32 bits, as vdpbf16ps takes them.
#include "rows.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define UNIWORLD_ATTENTION_BF16
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#endif
#include <immintrin.h>

#include <cfloat>
#define UNIWORLD_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#endif

namespace uniworld {
namespace {

#ifdef UNIWORLD_ATTENTION_BF16
constexpr int kRows = 6;           // of a register tile: 24 sums, 4 vectors on the right, 1 on the left
constexpr int kLanes = 16;         // 32-bit lanes of a vector
constexpr int64_t kTile = 64;      // columns of a register tile
constexpr int64_t kQueries = 48;   // of a task
constexpr int64_t kKeys = 256;     // of one step of the online softmax
constexpr int64_t kMaxChannels = 256;
constexpr int64_t kPairs = 144;    // from row to row of the left operand: 128, and 16 that spread rows over the L1 cache
constexpr int64_t kScores = kKeys + kLanes;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// [B, S, H, Dh] with strides in elements, channels contiguous.
struct Strided {
  const bfloat16* data;
  int64_t batch, token, head;

  const bfloat16* row(int64_t b, int64_t s, int64_t h) const { return data + b * batch + s * token + h * head; }
};

// The packed keys of a head are tiles of 64 keys, [Dh / 2, 64] pairs each (the last tile as many vectors wide as it
// needs); its packed values are tiles of 64 channels (the last may be 32), [S / 2, 64] pairs each.
struct Problem {
  Strided q, k, v;
  bfloat16* out;  // [B, S, H, Dh]
  uint32_t* packed;
  const int64_t* lengths;  // of the samples, or null: S
  int64_t B, S, H, Dh;

  int64_t length(int64_t b) const { return lengths ? lengths[b] : S; }
  int64_t head_size() const { return round_up(S, kTile) * Dh / 2; }  // in pairs, of keys or of values
  uint32_t* keys(int64_t b, int64_t h) const { return packed + (b * H + h) * 2 * head_size(); }
  uint32_t* values(int64_t b, int64_t h) const { return keys(b, h) + head_size(); }
};

// What one thread works on, 64-byte aligned.
struct Buffers {
  float scores[kQueries * kScores];
  float out[kQueries * kMaxChannels];
  uint32_t queries[kQueries * kPairs], weights[kQueries * kPairs];
  float shift[kQueries], sum[kQueries], decay[kQueries];
};

Buffers& buffers() {
  const auto address = reinterpret_cast<uintptr_t>(scratch((sizeof(Buffers) + 64) / sizeof(float)));
  return *reinterpret_cast<Buffers*>((address + 63) / 64 * 64);
}

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

// Keys first..first + 63 of a head, as far as there are; zeros up to the next multiple of 16.
UNIWORLD_BF16 void pack_keys(const Problem& p, int64_t b, int64_t h, int64_t first) {
  const int64_t rest = p.length(b) - first, width = std::min(kTile, round_up(rest, kLanes));
  uint32_t* tile = p.keys(b, h) + first * p.Dh / 2;
  for (int64_t key = 0; key < width; key += kLanes) {
    for (int64_t pair = 0; pair < p.Dh / 2; pair += kLanes) {
      __m512i x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = key + i < rest ? _mm512_loadu_si512(p.k.row(b, first + key + i, h) + 2 * pair) : _mm512_setzero_si512();
      }
      transpose(x);
      for (int i = 0; i < kLanes; ++i) _mm512_store_si512(tile + (pair + i) * width + key, x[i]);
    }
  }
}

// Rows first..first + 63 of a head's values, as far as there are; the last of an odd number is paired with zeros.
UNIWORLD_BF16 void pack_values(const Problem& p, int64_t b, int64_t h, int64_t first) {
  const int64_t length = p.length(b), last = std::min(first + kTile, length);
  __m512i lower, upper;  // where the words of two rows go: 0..31 are the first row's, 32..63 the second's
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = static_cast<uint16_t>(i / 2 + 32 * (i % 2));
  lower = _mm512_load_si512(order);
  upper = _mm512_load_si512(order + 32);
  for (int64_t channel = 0; channel < p.Dh; channel += 32) {
    const int64_t tile = channel / kTile * kTile, width = std::min(kTile, p.Dh - tile);
    uint32_t* to = p.values(b, h) + tile * round_up(length, 2) / 2 + first / 2 * width + channel - tile;
    for (int64_t row = first; row < last; row += 2, to += width) {
      const __m512i even = _mm512_loadu_si512(p.v.row(b, row, h) + channel);
      const __m512i odd =
          row + 1 < length ? _mm512_loadu_si512(p.v.row(b, row + 1, h) + channel) : _mm512_setzero_si512();
      _mm512_store_si512(to, _mm512_permutex2var_epi16(even, lower, odd));
      _mm512_store_si512(to + kLanes, _mm512_permutex2var_epi16(even, upper, odd));
    }
  }
}

// to = left right, or decay * to + left right where `decay` has a factor a row. left: kRows rows, kPairs apart, of
// `steps` pairs; right: [steps, 16 V] pairs; to: [kRows, 16 V] fp32 with `stride`.
template <int V, bool kDecay>
UNIWORLD_BF16 void multiply(const uint32_t* left, const uint32_t* right, int64_t steps, float* to, int64_t stride,
                            const float* decay) {
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
UNIWORLD_BF16 void multiply_rows(int64_t rows, int64_t columns, const uint32_t* left, const uint32_t* right,
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

// One query's `n` scores to bf16 weights 2^(scale * score - shift), where shift is the largest exponent yet; sum and
// earlier results are to be multiplied by decay. Weights past the last are zero up to a multiple of 32.
UNIWORLD_BF16 void soften(const float* scores, int64_t n, float scale, uint32_t* weights, float& shift, float& sum,
                          float& decay) {
  __m512 top = _mm512_set1_ps(-FLT_MAX);
  for (int64_t i = 0; i < n; i += kLanes) {
    top = _mm512_mask_max_ps(top, first_lanes(n - i), top, _mm512_load_ps(scores + i));
  }
  const float before = shift;
  shift = std::max(before, scale * _mm512_reduce_max_ps(top));
  const __m512 factor = _mm512_set1_ps(scale), offset = _mm512_set1_ps(shift);
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    __m512 y[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i + j * kLanes;
      const __m512 exponent = _mm512_fmsub_ps(_mm512_load_ps(scores + at), factor, offset);
      y[j] = _mm512_maskz_mov_ps(first_lanes(n - at), power_of_two(exponent));
      sums[j] = _mm512_add_ps(sums[j], y[j]);
    }
    _mm512_store_si512(weights + i / 2, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
  }
  decay = _mm512_cvtss_f32(power_of_two(_mm512_set1_ps(before - shift)));
  sum = sum * decay + _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

// Queries first..first + rows - 1 of a head into `to`, with rows of zeros up to `padded`.
void copy_queries(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t padded, uint32_t* to) {
  for (int64_t r = 0; r < padded; ++r) {
    if (r < rows) std::memcpy(to + r * kPairs, p.q.row(b, first + r, h), p.Dh * sizeof(bfloat16));
    else std::memset(to + r * kPairs, 0, p.Dh * sizeof(bfloat16));
  }
}

UNIWORLD_BF16 void write_rows(const Problem& p, int64_t b, int64_t h, int64_t first, int64_t rows, const Buffers& t) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = t.out + r * p.Dh;
    bfloat16* to = p.out + ((b * p.S + first + r) * p.H + h) * p.Dh;
    const __m512 factor = _mm512_set1_ps(1.f / t.sum[r]);
    for (int64_t i = 0; i < p.Dh; i += 2 * kLanes) {
      const __m512 low = _mm512_mul_ps(_mm512_load_ps(from + i), factor);
      const __m512 high = _mm512_mul_ps(_mm512_load_ps(from + i + kLanes), factor);
      _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

// Queries first..first + 47 of a head, as far as there are.
UNIWORLD_BF16 void attend(const Problem& p, int64_t b, int64_t h, int64_t first, float scale) {
  const int64_t length = p.length(b), Dh = p.Dh;
  const int64_t rows = std::min(kQueries, length - first), padded = round_up(rows, kRows);
  Buffers& t = buffers();
  copy_queries(p, b, h, first, rows, padded, t.queries);
  std::fill_n(t.out, padded * Dh, 0.f);
  std::fill_n(t.sum, padded, 0.f);
  std::fill_n(t.shift, padded, -FLT_MAX);
  for (int64_t key = 0; key < length; key += kKeys) {
    const int64_t n = std::min(kKeys, length - key);
    for (int64_t at = 0; at < n; at += kTile) {
      const int64_t columns = std::min(kTile, round_up(n - at, kLanes));
      multiply_rows<false>(padded, columns, t.queries, p.keys(b, h) + (key + at) * Dh / 2, Dh / 2, t.scores + at,
                           kScores, t.decay);
    }
    for (int64_t r = 0; r < padded; ++r) {
      soften(t.scores + r * kScores, n, scale, t.weights + r * kPairs, t.shift[r], t.sum[r], t.decay[r]);
    }
    for (int64_t at = 0; at < Dh; at += kTile) {
      const int64_t columns = std::min(kTile, Dh - at);
      const uint32_t* values = p.values(b, h) + at * round_up(length, 2) / 2 + key / 2 * columns;
      multiply_rows<true>(padded, columns, t.weights, values, (n + 1) / 2, t.out + at, Dh, t.decay);
    }
  }
  write_rows(p, b, h, first, rows, t);
}

void run_all(const Problem& p) {
  const float scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(p.Dh)));
  const int64_t heads = p.B * p.H, tiles = round_up(p.S, kTile) / kTile, blocks = round_up(p.S, kQueries) / kQueries;
#pragma omp parallel if (heads * p.S * p.S > kParallelElements)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < heads * tiles; ++task) {
      const int64_t b = task / tiles / p.H, h = task / tiles % p.H, first = task % tiles * kTile;
      if (first < p.length(b)) {
        pack_keys(p, b, h, first);
        pack_values(p, b, h, first);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * blocks; ++task) {
      const int64_t b = task / blocks / p.H, h = task / blocks % p.H, first = task % blocks * kQueries;
      if (first < p.length(b)) attend(p, b, h, first, scale);
    }
  }
}

// q, k, v: [B, S, H, Dh] bf16 by strides of batch, token and head; lengths: [B] int64, each in 1..S, or null;
// out: [B, S, H, Dh], written up to each length; workspace: attention_bf16_workspace(...) bytes, 64-byte aligned.
void attention_bf16(uintptr_t q, int64_t q_b, int64_t q_s, int64_t q_h, uintptr_t k, int64_t k_b, int64_t k_s,
                    int64_t k_h, uintptr_t v, int64_t v_b, int64_t v_s, int64_t v_h, uintptr_t lengths, uintptr_t out,
                    uintptr_t workspace, int64_t B, int64_t S, int64_t H, int64_t Dh) {
  run_all({{pointer<bfloat16>(q), q_b, q_s, q_h},
           {pointer<bfloat16>(k), k_b, k_s, k_h},
           {pointer<bfloat16>(v), v_b, v_s, v_h},
           pointer<bfloat16>(out),
           pointer<uint32_t>(workspace),
           pointer<int64_t>(lengths),
           B,
           S,
           H,
           Dh});
}

UNIWORLD_BF16 void power_of_two_all(uintptr_t x, uintptr_t out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512 y = power_of_two(_mm512_maskz_loadu_ps(lanes, pointer<float>(x) + i));
    _mm512_mask_storeu_ps(pointer<float>(out) + i, lanes, y);
  }
}

int64_t attention_bf16_workspace(int64_t B, int64_t S, int64_t H, int64_t Dh) {
  return 2 * B * H * round_up(S, kTile) * Dh * static_cast<int64_t>(sizeof(bfloat16));
}
#endif

}  // namespace

void bind_attention_bf16([[maybe_unused]] pybind11::module_& m) {
#ifdef UNIWORLD_ATTENTION_BF16
  m.def("attention_bf16", &attention_bf16, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("attention_bf16_workspace", &attention_bf16_workspace);
  m.def("attention_bf16_power_of_two", &power_of_two_all, "For tests: 2^x of n floats, as the softmax takes it.");
#endif
}

}  // namespace uniworld
