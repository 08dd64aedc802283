// Where the squares of image.h come from: geometry that every backend shares.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "csrc/image.h"

namespace bclip {

// [start, start + length) of the picture's pixels becomes `resized` pixels, of which those from `offset` on are wanted.
struct Edge {
  int64_t start;
  int64_t length;
  int64_t resized;
  int64_t offset;
};

// (vertical, horizontal); throws std::invalid_argument when the picture doesn't hold its box.
inline std::pair<Edge, Edge> edges(int64_t size, cpu::Crop crop, const int64_t* box, int64_t height, int64_t width) {
  if (crop == cpu::Crop::kBoxes) {
    const auto is_inside = [](int64_t start, int64_t length, int64_t whole) {
      return start >= 0 && length > 0 && start < whole && length <= whole - start;
    };
    if (!is_inside(box[0], box[2], height) || !is_inside(box[1], box[3], width)) {
      throw std::invalid_argument("box (top " + std::to_string(box[0]) + ", left " + std::to_string(box[1]) +
                                  ", height " + std::to_string(box[2]) + ", width " + std::to_string(box[3]) +
                                  ") is not inside the picture of " + std::to_string(width) + "x" +
                                  std::to_string(height) + " pixels");
    }
    return {{box[0], box[2], size, 0}, {box[1], box[3], size, 0}};
  }
  if (crop == cpu::Crop::kSquash) return {{0, height, size, 0}, {0, width, size, 0}};
  const auto edge = [&](int64_t length, int64_t other) {
    const int64_t resized =
        length <= other ? size : static_cast<int64_t>(static_cast<double>(size * length) / static_cast<double>(other));
    // Half to even, as Python rounds.
    return Edge{0, length, resized, std::llrint(static_cast<double>(resized - size) / 2)};
  };
  return {edge(height, width), edge(width, height)};
}

// Pillow 13's rule, older ones always begin along rows; on pictures where it matters results differ by a few levels at
// overshoots.
inline bool is_down_first(const Edge& vertical, const Edge& horizontal) {
  const int64_t down = vertical.length - vertical.resized, along = horizontal.length - horizontal.resized;
  return down > std::max<int64_t>(0, 2 * along);
}

}  // namespace bclip
