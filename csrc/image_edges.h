// The geometry of the crops and resizes of image.h, which every backend shares.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "csrc/image.h"

namespace bclip {

// The pixels [start, start + length) of one axis become `resized` pixels. The result begins at
// number `offset` of these.
struct Edge {
  int64_t start;
  int64_t length;
  int64_t resized;
  int64_t offset;
};

// Returns the vertical and the horizontal edge. Throws std::invalid_argument if the box isn't
// inside the image.
inline std::pair<Edge, Edge> edges(int64_t size, cpu::Crop crop, const int64_t* box, int64_t height,
                                   int64_t width) {
  if (crop == cpu::Crop::kBoxes) {
    const auto is_inside = [](int64_t start, int64_t length, int64_t extent) {
      return start >= 0 && length > 0 && start < extent && length <= extent - start;
    };
    if (!is_inside(box[0], box[2], height) || !is_inside(box[1], box[3], width)) {
      throw std::invalid_argument("box (top " + std::to_string(box[0]) + ", left " +
                                  std::to_string(box[1]) + ", height " + std::to_string(box[2]) +
                                  ", width " + std::to_string(box[3]) +
                                  ") is not inside the image of " + std::to_string(width) + "x" +
                                  std::to_string(height) + " pixels");
    }
    return {{box[0], box[2], size, 0}, {box[1], box[3], size, 0}};
  }
  if (crop == cpu::Crop::kSquash) return {{0, height, size, 0}, {0, width, size, 0}};
  const auto edge = [&](int64_t length, int64_t other) {
    const int64_t resized =
        length <= other
            ? size
            : static_cast<int64_t>(static_cast<double>(size * length) / static_cast<double>(other));
    // Rounds half to even, like Python.
    return Edge{0, length, resized, std::llrint(static_cast<double>(resized - size) / 2)};
  };
  return {edge(height, width), edge(width, height)};
}

// Whether the columns are resized before the rows, by Pillow 13's rule. Older versions always begin
// with the rows, which changes a few levels at overshoots.
inline bool is_down_first(const Edge& vertical, const Edge& horizontal) {
  const int64_t down = vertical.length - vertical.resized,
                along = horizontal.length - horizontal.resized;
  return down > std::max<int64_t>(0, 2 * along);
}

}  // namespace bclip
