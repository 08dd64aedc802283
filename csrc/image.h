// JPEG to RGB: the header's size, and the pixels as rows of height x width x 3 bytes, top row first.
// Pixels are those of libjpeg's accurate integer transform and smooth chroma upsampling, which Pillow uses too.
// EXIF orientation isn't applied.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bclip::cpu {

struct ImageSize {
  int height;
  int width;
};

// Throws std::invalid_argument when `data` is not a JPEG whose header can be read.
ImageSize jpeg_size(const uint8_t* data, size_t size);

// Writes height * width * 3 bytes to `pixels`. Throws std::invalid_argument when the file is truncated or broken, or
// its size is not height x width.
void decode_jpeg(const uint8_t* data, size_t size, uint8_t* pixels, int height, int width);

}  // namespace bclip::cpu
