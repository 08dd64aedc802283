// Pictures in device memory to squares, as csrc/image.h says: Pillow's fixed-point resize, then perhaps normalised.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "csrc/image.h"

namespace bclip::cuda {

// A block makes a tile of 16 x 16 pixels from chunks of 32 lines of 16 pixels of 4 bytes.
constexpr int IMAGE_SIDE = 16, IMAGE_CHUNK = 32, IMAGE_THREADS = IMAGE_SIDE * IMAGE_SIDE;
constexpr int IMAGE_SHARED_BYTES = IMAGE_SIDE * IMAGE_CHUNK * 4;

// One axis of a picture. Each output has 2 + `taps` words in the table of weights, from `words` on: the first pixel of
// its window, counted from `start`, the number of pixels, and their coefficients times 2^22.
struct Axis {
  int64_t start, length, resized, offset;  // as Edge of image_edges.h
  int64_t step;                            // bytes from pixel to pixel
  int64_t taps, words;
};

struct Picture {
  int64_t pixels;  // its first byte, counted from the batch's; rows of RGB without gaps. -1: a square of zeros
  Axis first, second;  // in the order of the passes
  int64_t along_first;
};

struct ImagePlan {
  std::vector<Picture> pictures;
  int64_t words = 0;                                    // of the table of weights
  std::vector<std::pair<int64_t, std::string>> errors;  // index and reason of each picture that doesn't hold its box
};

// `places`: offset of the pixels, height and width of each picture, -1 as offset for what isn't there.
ImagePlan image_plan(const std::vector<std::vector<int64_t>>& places, int size, cpu::Crop crop, const int64_t* boxes,
                     bool bicubic);

enum class ImageType { kUint8, kFloat32, kFloat16, kBfloat16 };

// All addresses are the device's.
struct ImageResize {
  const uint8_t* pixels;
  const Picture* pictures;
  int32_t* weights;  // `words` of the plan, written
  int64_t count;
  int size;
  bool bicubic;
  float factor[3], shift[3];  // level * factor + shift, by channel; not looked at for uint8
  void* out;                  // (count, size, size, 3) uint8, or (count, 3, size, size); written
  ImageType type;
  void* stream;
};

// Throws std::runtime_error with CUDA's reason.
void image_resize(const ImageResize& call);

}  // namespace bclip::cuda
