// Shared parts of the attention kernels.
#pragma once

#include "csrc/cuda/attention/attention.h"
#include "csrc/cuda/tile.cuh"
#include "csrc/philox.h"

namespace bclip::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Sequence {
  int64_t start;
  int length;
};

// Rows of a sequence after the first max_length do not count. The launch and its workspace have no
// room for them, and the host does not know the lengths.
__device__ __forceinline__ Sequence sequence_of(const Attention& attention, int64_t index) {
  if (!attention.bounds) return {index * attention.max_length, attention.max_length};
  const int64_t start = load_global(&attention.bounds[index]);
  const int length = static_cast<int>(load_global(&attention.bounds[index + 1]) - start);
  return {start, min(length, attention.max_length)};
}

// Four bits, one for each of the keys from 4 * quad on: whether dropout keeps the weight. The
// random words are those of the counter (quad, row, head, 0).
__device__ __forceinline__ uint32_t kept_of_quad(uint64_t seed, uint32_t threshold, uint32_t quad,
                                                 uint32_t row, uint32_t head) {
  const auto [a, b, c, d] = philox(seed, quad, row, head, 0);
  return (a >= threshold) | (b >= threshold) << 1 | (c >= threshold) << 2 | (d >= threshold) << 3;
}

// Stores 1 for each visible key of [first, first + keys), and 0 for one that is masked or after the
// end of the sequence.
__device__ __forceinline__ void store_visible(Shared<float> visible, const Attention& attention,
                                              const Sequence& sequence, int first, int keys,
                                              int threads) {
  for (int key = thread_index(); key < keys; key += threads) {
    const bool inside = first + key < sequence.length;
    const bool seen = inside && (!attention.key_mask ||
                                 load_global(&attention.key_mask[sequence.start + first + key]));
    visible.store(key, seen ? 1.0f : 0.0f);
  }
}

}  // namespace bclip::cuda
