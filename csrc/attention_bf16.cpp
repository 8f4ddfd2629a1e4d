// Attention forward in bf16 on CPUs with AVX512-BF16: vdpbf16ps, online softmax, fp32 inside.
//
// Keys and values are packed once, so that a register tile of 6 rows by 4 vectors reads its right operand in order.
// Then each task takes 48 queries of one head past all keys, 256 at a time. Letters: B batch, S tokens, H heads, Dh
// channels of a head.
#include "attention_bf16.h"

namespace uniworld {
namespace {

#ifdef UNIWORLD_ATTENTION_BF16
constexpr int64_t kQueries = 48;  // of a task
constexpr int64_t kKeys = 256;    // of one step of the online softmax
constexpr int64_t kScores = kKeys + kLanes;

struct Problem {
  Strided q, k, v;
  bfloat16* out;  // [B, S, H, Dh]
  float* lse;     // [B, H, S], of each query the base-2 logarithm of its sum of exponentials
  uint32_t* packed;
  const int64_t* lengths;  // of the samples, or null: S
  int64_t B, S, H, Dh;

  int64_t length(int64_t b) const { return lengths ? lengths[b] : S; }
  uint32_t* keys(int64_t b, int64_t h) const { return packed + (b * H + h) * 2 * packed_size(S, Dh); }
  uint32_t* values(int64_t b, int64_t h) const { return keys(b, h) + packed_size(S, Dh); }
};

// What one thread works on, 64-byte aligned.
struct Buffers {
  float scores[kQueries * kScores];
  float out[kQueries * kMaxChannels];
  uint32_t queries[kQueries * kPairs], weights[kQueries * kPairs];
  float shift[kQueries], sum[kQueries], decay[kQueries];
};

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

// Queries first..first + 47 of a head, as far as there are.
UNIWORLD_BF16 void attend(const Problem& p, int64_t b, int64_t h, int64_t first, float scale) {
  const int64_t length = p.length(b), Dh = p.Dh;
  const int64_t rows = std::min(kQueries, length - first), padded = round_up(rows, kRows);
  Buffers& t = thread_buffers<Buffers>();
  copy_rows(p.q, b, h, first, rows, padded, Dh, t.queries);
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
  for (int64_t r = 0; r < rows; ++r) {
    write_row(t.out + r * Dh, 1.f / t.sum[r], p.out + ((b * p.S + first + r) * p.H + h) * Dh, Dh);
    p.lse[(b * p.H + h) * p.S + first + r] = t.shift[r] + std::log2(t.sum[r]);
  }
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
        pack_tokens(p.k, b, h, first, p.length(b), p.Dh, p.keys(b, h));
        pack_channels(p.v, b, h, first, p.length(b), p.Dh, p.values(b, h));
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
// out: [B, S, H, Dh] and lse: [B, H, S] fp32, written up to each length;
// workspace: attention_bf16_workspace(...) bytes, 64-byte aligned.
void attention_bf16(uintptr_t q, int64_t q_b, int64_t q_s, int64_t q_h, uintptr_t k, int64_t k_b, int64_t k_s,
                    int64_t k_h, uintptr_t v, int64_t v_b, int64_t v_s, int64_t v_h, uintptr_t lengths, uintptr_t out,
                    uintptr_t lse, uintptr_t workspace, int64_t B, int64_t S, int64_t H, int64_t Dh) {
  run_all({{pointer<bfloat16>(q), q_b, q_s, q_h},
           {pointer<bfloat16>(k), k_b, k_s, k_h},
           {pointer<bfloat16>(v), v_b, v_s, v_h},
           pointer<bfloat16>(out),
           pointer<float>(lse),
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
