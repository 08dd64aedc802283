// JPEG to RGB: the size from the header, all pixels, or a batch of images resized to squares.
// Pixels are rows of height x width x 3 bytes, top row first. They come from libjpeg's accurate
// integer transform with smooth chroma upsampling, which Pillow uses too. The resize equals Pillow
// 13's bit for bit (image_kernels.h explains the rounding). EXIF orientation isn't applied.
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

// Throws std::invalid_argument if `data` has no readable JPEG header.
ImageSize jpeg_size(std::string_view data);

// Writes height * width * 3 bytes to `pixels`. Throws std::invalid_argument if the file is
// truncated or damaged (docs/images.md lists the signs), or if its size divided by `reduced` and
// rounded up is not height x width. `reduced` is 1, 2, 4 or 8. If `needs_end` is false, the file
// may lack the end marker after its only scan.
void decode_jpeg(std::string_view data, uint8_t* pixels, int height, int width, int reduced = 1,
                 bool needs_end = true);

// The part of an image that becomes the square.
//   kCenter: the shorter edge is resized to `size` and the longer one in proportion, rounded down.
//            The excess is cut off equally at both ends.
//   kSquash: the whole image.
//   kBoxes:  a box of the image, cut out before the resize.
enum class Crop { kCenter, kSquash, kBoxes };

struct DecodeResize {
  int size;
  Crop crop;
  const int64_t* boxes;  // (n, 4) top, left, height, width for kBoxes, else null
  bool bicubic;          // else bilinear
  // If false, an image that is much larger than the result is decoded at 1/2, 1/4 or 1/8 of its
  // size. The chroma of an image that is only somewhat larger is upsampled without smoothing.
  bool exact;
  int64_t max_pixels;  // an image with more pixels is an error
};

// Writes (n, size, size, 3) `pixels`. Returns the index and the reason for each unusable file,
// whose pixels become 0. Rows below the part in use aren't read, so damage there stays undetected.
std::vector<std::pair<int64_t, std::string>> decode_resize(
    const std::vector<std::string_view>& files, const DecodeResize& options, uint8_t* pixels,
    int threads);

}  // namespace bclip::cpu
