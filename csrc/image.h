// JPEG to RGB: the header's size, the pixels as rows of height x width x 3 bytes, top row first, or a batch of pictures
// resized to squares. Pixels are those of libjpeg's accurate integer transform and smooth chroma upsampling, which Pillow
// uses too; the resize is Pillow 13's to the bit (rounding: image_kernels.h).
// EXIF orientation isn't applied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace bclip::cpu {

struct ImageSize {
  int height;
  int width;
};

// Throws std::invalid_argument when `data` is not a JPEG whose header can be read.
ImageSize jpeg_size(std::string_view data);

// Writes height * width * 3 bytes to `pixels`. Throws std::invalid_argument when the file is truncated or broken, or
// its size is not height x width.
void decode_jpeg(std::string_view data, uint8_t* pixels, int height, int width);

// What of a picture becomes the square. kCenter: the shorter edge is resized to `size`, the longer one in proportion, cut
// to whole pixels, and what it has too much is cut off at both ends. kSquash: all of it. kBoxes: the picture's box, cut
// out before the resize.
enum class Crop { kCenter, kSquash, kBoxes };

struct DecodeResize {
  int size;
  Crop crop;
  const int64_t* boxes;  // (n, 4) top, left, height, width; null but for kBoxes
  bool bicubic;          // or bilinear
  // Otherwise a picture that is much larger than the result is decoded at 1/2, 1/4 or 1/8 of its size, and one that is
  // larger gets its chroma upsampled without smoothing.
  bool exact;
  int64_t max_pixels;  // a picture of more is an error
};

// (n, size, size, 3) `pixels`; returns the index and the reason of each file that is no good, whose pixels are 0. What
// lies below the part that is needed isn't read, so that damage there goes unseen.
std::vector<std::pair<int64_t, std::string>> decode_resize(const std::vector<std::string_view>& files,
                                                           const DecodeResize& wanted, uint8_t* pixels, int threads);

}  // namespace bclip::cpu
