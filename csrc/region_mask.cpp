// The region-mask pipeline on bitmaps, 64 pixels a word. Every step gives the bits that Pillow and OpenCV give:
//   difference  PIL.ImageChops.difference, convert("L"), >= 18
//   closing     cv2.morphologyEx(MORPH_CLOSE, 5x5 MORPH_ELLIPSE)
//   components  cv2.connectedComponentsWithStats(connectivity=8)
// One thread: a whole 1024x1024 pair takes under a millisecond, and data loaders run one process a core.
// Letters: H, W image height and width in pixels; a cell is the 8x8 pixels of one latent pixel.
#include "region_mask.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "core.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define UNIWORLD_AVX2 1
#include <immintrin.h>
#endif

namespace uniworld {
namespace {

constexpr int kThreshold = 18;
constexpr int kCell = 8;

// Pillow's L = (19595 R + 38470 G + 7471 B + 2^15) >> 16, so that L >= 18 is one comparison of the sum.
constexpr int kRed = 19595, kGreen = 38470, kBlue = 7471;
constexpr int kLeastSum = (kThreshold << 16) - (1 << 15);

bool differs(const uint8_t* a, const uint8_t* b) {
  const int sum = kRed * std::abs(a[0] - b[0]) + kGreen * std::abs(a[1] - b[1]) + kBlue * std::abs(a[2] - b[2]);
  return sum >= kLeastSum;
}

// Pixels first..W of one row, W - first of them, into bits that are still zero.
template <int PixelBytes>
void threshold_row_scalar(const uint8_t* a, const uint8_t* b, int64_t first, int64_t width, uint64_t* bits) {
  for (int64_t x = first; x < width; ++x) {
    const uint64_t bit = differs(a + x * PixelBytes, b + x * PixelBytes);
    bits[x / 64] |= bit << (x % 64);
  }
}

#ifdef UNIWORLD_AVX2
// Eight pixels as R G B 0 (or R G B X). The packed form reads 28 bytes for its 24.
template <int PixelBytes>
__attribute__((target("avx2"))) inline __m256i load8(const uint8_t* p) {
  if (PixelBytes == 4) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 12));
  const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                          0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), spread);
}

template <int PixelBytes>
__attribute__((target("avx2"))) int64_t threshold_row_avx2(const uint8_t* a, const uint8_t* b, int64_t width,
                                                           uint64_t* bits) {
  // 38470 does not fit a signed 16-bit factor, so green enters at half and is doubled.
  const __m256i red_blue = _mm256_set1_epi32(kRed | (kBlue << 16));
  const __m256i half_green = _mm256_set1_epi32(kGreen / 2);
  const __m256i below = _mm256_set1_epi32(kLeastSum - 1);
  const __m256i even_bytes = _mm256_set1_epi16(0xff);
  const int64_t end = PixelBytes == 4 ? width - 7 : width - 9;  // the packed load must not pass the end of the row
  int64_t x = 0;
  for (; x < end; x += 8) {
    const __m256i p = load8<PixelBytes>(a + x * PixelBytes), q = load8<PixelBytes>(b + x * PixelBytes);
    const __m256i d = _mm256_or_si256(_mm256_subs_epu8(p, q), _mm256_subs_epu8(q, p));
    const __m256i rb = _mm256_madd_epi16(_mm256_and_si256(d, even_bytes), red_blue);
    const __m256i g = _mm256_madd_epi16(_mm256_srli_epi16(d, 8), half_green);
    const __m256i set = _mm256_cmpgt_epi32(_mm256_add_epi32(rb, _mm256_slli_epi32(g, 1)), below);
    const uint64_t eight = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(set)));
    bits[x / 64] |= eight << (x % 64);
  }
  return x;
}
#endif

template <int PixelBytes>
void threshold_rows(const uint8_t* a, const uint8_t* b, Bitmap& out) {
#ifdef UNIWORLD_AVX2
  const bool avx2 = __builtin_cpu_supports("avx2");
#endif
  for (int64_t y = 0; y < out.height; ++y) {
    const int64_t offset = y * out.width * PixelBytes;
    int64_t done = 0;
#ifdef UNIWORLD_AVX2
    if (avx2) done = threshold_row_avx2<PixelBytes>(a + offset, b + offset, out.width, out.row(y));
#endif
    threshold_row_scalar<PixelBytes>(a + offset, b + offset, done, out.width, out.row(y));
  }
}

// The 5x5 ellipse is full in its three middle rows and has only the centre column in the first and last.
// `flip` complements input and output, which turns the dilation into an erosion with ones outside the image.
void dilate_row(const Bitmap& in, int64_t y, bool flip, uint64_t* out) {
  const int64_t n = in.stride;
  const uint64_t mask = flip ? ~uint64_t{0} : 0;
  const bool has_up = y > 0, has_down = y + 1 < in.height;
  const uint64_t* centre = in.row(y);
  const uint64_t* up = has_up ? in.row(y - 1) : centre;
  const uint64_t* down = has_down ? in.row(y + 1) : centre;
  const uint64_t* up2 = y > 1 ? in.row(y - 2) : centre;  // a missing row is replaced by one that changes nothing
  const uint64_t* down2 = y + 2 < in.height ? in.row(y + 2) : centre;
  const auto middle = [&](int64_t i) {
    const uint64_t word = (centre[i] ^ mask) | (up[i] ^ mask) | (down[i] ^ mask);
    return i + 1 == n ? word & in.tail() : word;
  };
  uint64_t before = 0, here = middle(0);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t after = i + 1 < n ? middle(i + 1) : 0;
    uint64_t word = here | (here << 1) | (here << 2) | (here >> 1) | (here >> 2);
    word |= (before >> 63) | (before >> 62) | (after << 63) | (after << 62);
    word |= (up2[i] ^ mask) | (down2[i] ^ mask);
    out[i] = (word ^ mask) & (i + 1 == n ? in.tail() : ~uint64_t{0});
    before = here;
    here = after;
  }
}

void dilate(const Bitmap& in, bool flip, Bitmap& out) {
  for (int64_t y = 0; y < in.height; ++y) dilate_row(in, y, flip, out.row(y));
}

// A horizontal run of set pixels, [begin, end) in row y.
struct Run {
  int32_t y, begin, end;
};

// The runs of each row, found word by word from the bits where the row changes.
void append_runs(const uint64_t* bits, int64_t stride, int32_t y, int32_t width, std::vector<Run>& runs) {
  uint64_t carry = 0;
  int32_t begin = -1;
  for (int64_t i = 0; i < stride; ++i) {
    uint64_t edges = bits[i] ^ ((bits[i] << 1) | carry);
    carry = bits[i] >> 63;
    for (; edges != 0; edges &= edges - 1) {
      const int32_t x = static_cast<int32_t>(i * 64 + __builtin_ctzll(edges));
      if (begin < 0) {
        begin = x;
      } else {
        runs.push_back({y, begin, x});
        begin = -1;
      }
    }
  }
  if (begin >= 0) runs.push_back({y, begin, width});
}

int32_t find_root(std::vector<int32_t>& parent, int32_t i) {
  while (parent[i] != i) i = parent[i] = parent[parent[i]];
  return i;
}

void unite(std::vector<int32_t>& parent, int32_t i, int32_t j) {
  i = find_root(parent, i);
  j = find_root(parent, j);
  parent[std::max(i, j)] = std::min(i, j);
}

// The component of each run: its first run. Runs are sorted by row, then by column.
std::vector<int32_t> label_runs(const std::vector<Run>& runs) {
  std::vector<int32_t> parent(runs.size());
  std::iota(parent.begin(), parent.end(), 0);
  const int32_t n = static_cast<int32_t>(runs.size());
  int32_t above = 0;
  for (int32_t i = 0; i < n; ++i) {
    // Touching diagonally counts: [begin, end) meets [begin', end') when begin' <= end and end' >= begin.
    while (runs[above].y < runs[i].y - 1 || (runs[above].y == runs[i].y - 1 && runs[above].end < runs[i].begin)) ++above;
    for (int32_t j = above; runs[j].y == runs[i].y - 1 && runs[j].begin <= runs[i].end; ++j) unite(parent, j, i);
  }
  for (int32_t i = 0; i < n; ++i) parent[i] = parent[parent[i]];  // a root precedes its members
  return parent;
}

void clear_run(Bitmap& image, const Run& run) {
  uint64_t* bits = image.row(run.y);
  const int64_t first = run.begin / 64, last = (run.end - 1) / 64;
  const uint64_t from = ~uint64_t{0} << (run.begin % 64), to = ~uint64_t{0} >> (63 - (run.end - 1) % 64);
  if (first == last) {
    bits[first] &= ~(from & to);
    return;
  }
  bits[first] &= ~from;
  std::fill(bits + first + 1, bits + last, 0);
  bits[last] &= ~to;
}

// The part of Arrow's C data interface that is read here (arrow.apache.org/docs/format/CDataInterface.html).
struct ArrowArray {
  int64_t length, null_count, offset, n_buffers, n_children;
  const void** buffers;
  ArrowArray** children;
};

// Where the 4-byte pixels of an RGB image lie that Pillow exported as fixed-size lists of four uint8.
uintptr_t arrow_pixels(const pybind11::capsule& exported) {
  const ArrowArray* array = exported.get_pointer<ArrowArray>();
  if (array->n_children != 1 || array->offset != 0) throw pybind11::value_error("not an RGB image exported by Pillow");
  const ArrowArray* bytes = array->children[0];
  if (bytes->n_buffers != 2 || bytes->offset != 0) throw pybind11::value_error("not an RGB image exported by Pillow");
  return reinterpret_cast<uintptr_t>(bytes->buffers[1]);
}

// Writes 0 or 255 for each cell to `out` [H/8, W/8] and returns how many pixels changed against every reference.
int64_t region_mask(const std::vector<uintptr_t>& references, uintptr_t target, int64_t height, int64_t width,
                    int pixel_bytes, bool keep_scattered, uintptr_t out) {
  Bitmap edited(height, width);
  for (size_t i = 0; i < references.size(); ++i) {
    Bitmap changed(height, width);
    threshold_difference({pointer<uint8_t>(references[i]), pixel_bytes}, {pointer<uint8_t>(target), pixel_bytes},
                         changed);
    close_ellipse5(changed);
    drop_small_components(changed, keep_scattered);
    if (i == 0) {
      edited.words.swap(changed.words);
    } else {
      for (size_t k = 0; k < edited.words.size(); ++k) edited.words[k] &= changed.words[k];
    }
  }
  Bitmap cells = max_pool8(edited);
  close_ellipse5(cells);
  uint8_t* mask = pointer<uint8_t>(out);
  for (int64_t y = 0; y < cells.height; ++y)
    for (int64_t x = 0; x < cells.width; ++x) *mask++ = (cells.row(y)[x / 64] >> (x % 64)) & 1 ? 255 : 0;
  return edited.count();
}

}  // namespace

int64_t Bitmap::count() const {
  return std::accumulate(words.begin(), words.end(), int64_t{0},
                         [](int64_t sum, uint64_t word) { return sum + __builtin_popcountll(word); });
}

void threshold_difference(const ImageView& a, const ImageView& b, Bitmap& changed) {
  a.pixel_bytes == 4 ? threshold_rows<4>(a.data, b.data, changed) : threshold_rows<3>(a.data, b.data, changed);
}

void close_ellipse5(Bitmap& image) {
  Bitmap dilated(image.height, image.width);
  dilate(image, false, dilated);
  dilate(dilated, true, image);
}

void drop_small_components(Bitmap& image, bool keep_scattered) {
  std::vector<Run> runs;
  for (int64_t y = 0; y < image.height; ++y)
    append_runs(image.row(y), image.stride, static_cast<int32_t>(y), static_cast<int32_t>(image.width), runs);
  const std::vector<int32_t> component = label_runs(runs);
  std::vector<int64_t> area(runs.size());
  for (size_t i = 0; i < runs.size(); ++i) area[component[i]] += runs[i].end - runs[i].begin;
  const int64_t total = std::accumulate(area.begin(), area.end(), int64_t{0});
  const bool any_large = std::any_of(area.begin(), area.end(), [&](int64_t a) { return a > 0 && 10 * a >= 3 * total; });
  const int64_t scattered_least = int64_t{10} * kCell * kCell;
  const int64_t least = keep_scattered && !any_large ? scattered_least : 3 * total;
  for (size_t i = 0; i < runs.size(); ++i)
    if (10 * area[component[i]] < least) clear_run(image, runs[i]);
}

Bitmap max_pool8(const Bitmap& image) {
  Bitmap cells(image.height / kCell, image.width / kCell);
  std::vector<uint64_t> column_or(static_cast<size_t>(image.stride));
  for (int64_t y = 0; y < cells.height; ++y) {
    std::fill(column_or.begin(), column_or.end(), 0);
    for (int64_t i = 0; i < kCell; ++i)
      for (int64_t k = 0; k < image.stride; ++k) column_or[k] |= image.row(y * kCell + i)[k];
    for (int64_t x = 0; x < cells.width; ++x) {
      const uint64_t cell = (column_or[x / 8] >> (x % 8 * 8)) & 0xff;
      cells.row(y)[x / 64] |= static_cast<uint64_t>(cell != 0) << (x % 64);
    }
  }
  return cells;
}

void bind_region_mask(pybind11::module_& m) {
  m.def("region_mask", &region_mask, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("arrow_pixels", &arrow_pixels);
}

}  // namespace uniworld
