// Resizes images in device memory to squares as csrc/image.h defines it, in Pillow's fixed-point
// arithmetic, and can normalise them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "csrc/image.h"

namespace bclip::cuda {

// A block of threads computes a tile of 16 x 16 pixels. It reads chunks of 32 lines of 16 pixels,
// with 4 bytes for each pixel.
constexpr int kImageSide = 16, kImageChunk = 32, kImageThreads = kImageSide * kImageSide;
constexpr int kImageSharedBytes = kImageSide * kImageChunk * 4;

// One axis of an image. Each output has 2 + `taps` words in the table of weights, from `words` on.
// The first word is the first pixel of its window, counted from `start`. The second is the number
// of pixels. The others are their coefficients times 2^22.
struct Axis {
  int64_t start, length, resized, offset;  // as Edge of image_edges.h
  int64_t step;                            // bytes from pixel to pixel
  int64_t taps, words;
};

struct ImageLayout {
  // Offset of the first byte in the batch, or -1 for a square of zeros. Rows of RGB have no gaps.
  int64_t pixels;
  Axis first, second;  // in the order of the passes
  int64_t along_first;
};

struct ImagePlan {
  std::vector<ImageLayout> images;
  int64_t words = 0;  // words of the table of weights
  // The index of each image that doesn't contain its box, and the reason.
  std::vector<std::pair<int64_t, std::string>> errors;
};

// `places`: offset of the pixels, height and width of each image. The offset is -1 for a missing
// image.
ImagePlan image_plan(const std::vector<std::vector<int64_t>>& places, int size, cpu::Crop crop,
                     const int64_t* boxes, bool bicubic);

enum class ImageType { kUint8, kFloat32, kFloat16, kBfloat16 };

// All addresses are the device's.
struct ImageResize {
  const uint8_t* pixels;
  const ImageLayout* images;
  int32_t* weights;  // `words` of the plan, written
  int64_t count;
  int size;
  bool bicubic;
  float factor[3], shift[3];  // level * factor + shift, by channel; unused for uint8
  void* out;                  // (count, size, size, 3) uint8, or (count, 3, size, size); written
  ImageType type;
  void* stream;
};

// Throws std::runtime_error with CUDA's reason.
void image_resize(const ImageResize& call);

}  // namespace bclip::cuda
