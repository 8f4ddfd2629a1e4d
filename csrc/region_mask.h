// The region mask of one (references, target) group: which latent pixels the edit touches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace uniworld {

// A binary image, one bit a pixel: bit x % 64 of word y * stride + x / 64. Bits beyond the width are zero.
struct Bitmap {
  int64_t height, width, stride;
  std::vector<uint64_t> words;

  Bitmap(int64_t height, int64_t width)
      : height(height), width(width), stride((width + 63) / 64), words(static_cast<size_t>(height * stride)) {}
  uint64_t* row(int64_t y) { return words.data() + y * stride; }
  const uint64_t* row(int64_t y) const { return words.data() + y * stride; }
  uint64_t tail() const { return width % 64 == 0 ? ~uint64_t{0} : (uint64_t{1} << (width % 64)) - 1; }
  int64_t count() const;
};

// An 8-bit RGB image in memory: pixel_bytes is 3 (packed) or 4 (fourth byte ignored); rows follow without gaps.
struct ImageView {
  const uint8_t* data;
  int pixel_bytes;
};

// Sets the bits of the pixels whose grey absolute difference is at least 18. Both images have the same pixel_bytes.
void threshold_difference(const ImageView& a, const ImageView& b, Bitmap& changed);

// Morphological closing with OpenCV's 5x5 ellipse; pixels outside the image never win.
void close_ellipse5(Bitmap& image);

// Clears the 8-connected components below 30 % of the set pixels. If `keep_scattered` and none reaches 30 %, those of
// at least one latent pixel (8x8) stay.
void drop_small_components(Bitmap& image, bool keep_scattered);

// ORs each 8x8 cell into one bit; rows and columns that fill no whole cell are left out, as a stride-8 max pool does.
Bitmap max_pool8(const Bitmap& image);

}  // namespace uniworld
