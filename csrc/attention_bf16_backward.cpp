// Attention backward in bf16 on CPUs with AVX512-BF16 (Dao et al., 2022, FlashAttention, appendix B.2).
//
// A task is a head. It goes over the scores twice: by rows of queries for dq, and by rows of keys for dk and dv, so
// that all sums over tokens are products with a packed right operand, nothing is transposed, and no two threads add to
// one place. Weights and their gradients are fp32, rounded to bf16 where they are multiplied.
// Letters: B batch, S tokens, H heads, Dh channels of a head, w = softmax(scale q k^T), dw = dout v^T.
#include "attention_bf16.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>

namespace uniworld {
namespace {

#ifdef UNIWORLD_ATTENTION_BF16
constexpr int64_t kBlock = 48;     // rows of a step
constexpr int64_t kColumns = 128;  // of a step
constexpr int64_t kScores = kColumns + kLanes;

struct Problem {
  Strided q, k, v, dout, out;
  bfloat16 *dq, *dk, *dv;  // [B, S, H, Dh]
  const float* lse;        // [B, H, S], as the forward pass writes it
  const int64_t* lengths;  // of the samples, or null: S
  int64_t B, S, H, Dh;

  int64_t length(int64_t b) const { return lengths ? lengths[b] : S; }
};

// What one thread works on, 64-byte aligned.
struct Buffers {
  float scores[kBlock * kScores], dweights[kBlock * kScores];
  float sums[2][kBlock * kMaxChannels];
  uint32_t left[2][kBlock * kPairs], weights[kBlock * kPairs], dscores[kBlock * kPairs];
  float ones[kBlock];
};

// The operands of one head that a thread needs whole.
struct Head {
  Head(int64_t S, int64_t Dh) : size(packed_size(S, Dh)), padded(round_up(S, kTile)) {
    const int64_t words = 7 * size + 2 * padded;
    memory = std::make_unique<uint32_t[]>(words + kLanes);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    start = reinterpret_cast<uint32_t*>((address + 63) / 64 * 64);
  }
  uint32_t* packed(int i) const { return start + i * size; }
  float* lse() const { return reinterpret_cast<float*>(start + 7 * size); }
  float* dots() const { return lse() + padded; }

  int64_t size, padded;
  std::unique_ptr<uint32_t[]> memory;
  uint32_t* start;
};
enum Packed { kQTokens, kKTokens, kVTokens, kDoutTokens, kQChannels, kKChannels, kDoutChannels };

// dots[s] = dout[s] . out[s], which is the mean of dw under w.
UNIWORLD_BF16 void dot_rows(const Problem& p, int64_t b, int64_t h, float* dots) {
  for (int64_t s = 0; s < p.length(b); ++s) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < p.Dh; i += 2 * kLanes) {
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(p.dout.row(b, s, h) + i),
                             (__m512bh)_mm512_loadu_si512(p.out.row(b, s, h) + i));
    }
    dots[s] = _mm512_reduce_add_ps(sum);
  }
}

void pack(const Problem& p, int64_t b, int64_t h, const Head& head) {
  const int64_t length = p.length(b);
  for (int64_t first = 0; first < length; first += kTile) {
    pack_tokens(p.q, b, h, first, length, p.Dh, head.packed(kQTokens));
    pack_tokens(p.k, b, h, first, length, p.Dh, head.packed(kKTokens));
    pack_tokens(p.v, b, h, first, length, p.Dh, head.packed(kVTokens));
    pack_tokens(p.dout, b, h, first, length, p.Dh, head.packed(kDoutTokens));
    pack_channels(p.q, b, h, first, length, p.Dh, head.packed(kQChannels));
    pack_channels(p.k, b, h, first, length, p.Dh, head.packed(kKChannels));
    pack_channels(p.dout, b, h, first, length, p.Dh, head.packed(kDoutChannels));
  }
  dot_rows(p, b, h, head.dots());
  std::copy_n(p.lse + (b * p.H + h) * p.S, length, head.lse());
}

// One row of `n` scores and dw to bf16 pairs of w and of the scores' gradient, zeros up to a multiple of 32. lse and
// dots are the query's where a row is a query, else one a column.
template <bool kRowIsQuery>
UNIWORLD_BF16 void differentiate_row(const float* scores, const float* dweights, int64_t n, float scale,
                                     const float* lse, const float* dots, uint32_t* weights, uint32_t* dscores) {
  const __m512 exponent_scale = _mm512_set1_ps(scale * 1.4426950408889634f), factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    __m512 w[2], d[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i + j * kLanes;
      const __mmask16 lanes = first_lanes(n - at);
      const __m512 offset = kRowIsQuery ? _mm512_set1_ps(*lse) : _mm512_maskz_loadu_ps(lanes, lse + at);
      const __m512 dot = kRowIsQuery ? _mm512_set1_ps(*dots) : _mm512_maskz_loadu_ps(lanes, dots + at);
      const __m512 exponent = _mm512_fmsub_ps(_mm512_load_ps(scores + at), exponent_scale, offset);
      w[j] = _mm512_maskz_mov_ps(lanes, power_of_two(exponent));
      const __m512 centred = _mm512_sub_ps(_mm512_load_ps(dweights + at), dot);
      d[j] = _mm512_maskz_mul_ps(lanes, _mm512_mul_ps(w[j], factor), centred);
    }
    if (weights) _mm512_store_si512(weights + i / 2, (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]));
    _mm512_store_si512(dscores + i / 2, (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]));
  }
}

// to[rows, columns] = left tokens[first..], columns as they are packed.
void products(const uint32_t* left, const uint32_t* tokens, int64_t first, int64_t n, int64_t rows, int64_t Dh,
              float* to, const float* ones) {
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t columns = std::min(kTile, round_up(n - at, kLanes));
    multiply_rows<false>(rows, columns, left, tokens + (first + at) * Dh / 2, Dh / 2, to + at, kScores, ones);
  }
}

// sums[rows, Dh] += left channels[first..first + n - 1].
void accumulate(const uint32_t* left, const uint32_t* channels, int64_t first, int64_t n, int64_t length, int64_t rows,
                int64_t Dh, float* sums, const float* ones) {
  for (int64_t at = 0; at < Dh; at += kTile) {
    const int64_t columns = std::min(kTile, Dh - at);
    const uint32_t* right = channels + at * round_up(length, 2) / 2 + first / 2 * columns;
    multiply_rows<true>(rows, columns, left, right, (n + 1) / 2, sums + at, Dh, ones);
  }
}

// Queries first..first + 47 of a head past all keys (kRowIsQuery: dq), or keys past all queries (dk, dv).
template <bool kRowIsQuery>
void differentiate_block(const Problem& p, int64_t b, int64_t h, int64_t first, const Head& head) {
  const int64_t length = p.length(b), Dh = p.Dh;
  const int64_t rows = std::min(kBlock, length - first), padded = round_up(rows, kRows);
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(Dh)));
  Buffers& t = thread_buffers<Buffers>();
  std::fill_n(t.ones, kBlock, 1.f);
  copy_rows(kRowIsQuery ? p.q : p.k, b, h, first, rows, padded, Dh, t.left[0]);
  copy_rows(kRowIsQuery ? p.dout : p.v, b, h, first, rows, padded, Dh, t.left[1]);
  for (auto& sums : t.sums) std::fill_n(sums, padded * Dh, 0.f);
  for (int64_t at = 0; at < length; at += kColumns) {
    const int64_t n = std::min(kColumns, length - at);
    products(t.left[0], head.packed(kRowIsQuery ? kKTokens : kQTokens), at, n, padded, Dh, t.scores, t.ones);
    products(t.left[1], head.packed(kRowIsQuery ? kVTokens : kDoutTokens), at, n, padded, Dh, t.dweights, t.ones);
    for (int64_t r = 0; r < padded; ++r) {
      const int64_t query = kRowIsQuery ? std::min(first + r, length - 1) : at;
      differentiate_row<kRowIsQuery>(t.scores + r * kScores, t.dweights + r * kScores, n, scale, head.lse() + query,
                                     head.dots() + query, kRowIsQuery ? nullptr : t.weights + r * kPairs,
                                     t.dscores + r * kPairs);
    }
    const uint32_t* channels = head.packed(kRowIsQuery ? kKChannels : kQChannels);
    accumulate(t.dscores, channels, at, n, length, padded, Dh, t.sums[0], t.ones);
    if (!kRowIsQuery) {
      accumulate(t.weights, head.packed(kDoutChannels), at, n, length, padded, Dh, t.sums[1], t.ones);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t to = ((b * p.S + first + r) * p.H + h) * Dh;
    write_row(t.sums[0] + r * Dh, 1.f, (kRowIsQuery ? p.dq : p.dk) + to, Dh);
    if (!kRowIsQuery) write_row(t.sums[1] + r * Dh, 1.f, p.dv + to, Dh);
  }
}

// q, k, v, dout, out: [B, S, H, Dh] bf16 by strides of batch, token and head; lse: [B, H, S] fp32 of the forward pass;
// lengths: [B] int64, each in 1..S, or null; dq, dk, dv: [B, S, H, Dh], written up to each length.
void attention_bf16_backward(std::array<int64_t, 4> q, std::array<int64_t, 4> k, std::array<int64_t, 4> v,
                             std::array<int64_t, 4> dout, std::array<int64_t, 4> out, uintptr_t lse, uintptr_t lengths,
                             uintptr_t dq, uintptr_t dk, uintptr_t dv, int64_t B, int64_t S, int64_t H, int64_t Dh) {
  const auto strided = [](const std::array<int64_t, 4>& x) {
    return Strided{pointer<bfloat16>(static_cast<uintptr_t>(x[0])), x[1], x[2], x[3]};
  };
  const Problem p{strided(q), strided(k), strided(v), strided(dout), strided(out), pointer<bfloat16>(dq),
                  pointer<bfloat16>(dk), pointer<bfloat16>(dv), pointer<float>(lse), pointer<int64_t>(lengths),
                  B, S, H, Dh};
#pragma omp parallel if (B * H * S * S > kParallelElements)
  {
    const Head head(S, Dh);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < B * H; ++task) {
      const int64_t b = task / H, h = task % H;
      pack(p, b, h, head);
      for (int64_t first = 0; first < p.length(b); first += kBlock) {
        differentiate_block<true>(p, b, h, first, head);
        differentiate_block<false>(p, b, h, first, head);
      }
    }
  }
}
#endif

}  // namespace

void bind_attention_bf16_backward([[maybe_unused]] pybind11::module_& m) {
#ifdef UNIWORLD_ATTENTION_BF16
  m.def("attention_bf16_backward", &attention_bf16_backward, pybind11::call_guard<pybind11::gil_scoped_release>());
#endif
}

}  // namespace uniworld
