// What the attention kernels share.
#pragma once

#include "csrc/cuda/attention/attention.h"
#include "csrc/cuda/tile.cuh"

namespace bclip::cuda {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

struct Sequence {
  int64_t start;
  int length;
};

__device__ __forceinline__ Sequence sequence_of(const Attention& attention, int64_t index) {
  if (!attention.bounds) return {index * attention.max_length, attention.max_length};
  const int64_t start = attention.bounds[index];
  return {start, static_cast<int>(attention.bounds[index + 1] - start)};
}

// Four bits, one for each of the keys 4 quad, ...: whether dropout keeps the weight. Philox4x32-10 (Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3") of the counter (quad, row, head, 0).
__device__ __forceinline__ uint32_t kept_of_quad(uint64_t seed, uint32_t threshold, uint32_t quad, uint32_t row,
                                                 uint32_t head) {
  uint32_t a = quad, b = row, c = head, d = 0;
  uint32_t left = static_cast<uint32_t>(seed), right = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    const uint32_t first_high = high_product(0xd2511f53u, a), first_low = 0xd2511f53u * a;
    const uint32_t second_high = high_product(0xcd9e8d57u, c), second_low = 0xcd9e8d57u * c;
    a = second_high ^ b ^ left;
    b = second_low;
    c = first_high ^ d ^ right;
    d = first_low;
    left += 0x9e3779b9u;
    right += 0xbb67ae85u;
  }
  return (a >= threshold) | (b >= threshold) << 1 | (c >= threshold) << 2 | (d >= threshold) << 3;
}

// 1 where a key is seen, 0 where it is masked or past the sequence's end; for the keys [first, first + keys).
__device__ __forceinline__ void store_visible(Shared<float> visible, const Attention& attention,
                                              const Sequence& sequence, int first, int keys, int threads) {
  for (int key = thread_index(); key < keys; key += threads) {
    const bool inside = first + key < sequence.length;
    const bool seen = inside && (!attention.key_mask || attention.key_mask[sequence.start + first + key]);
    visible.store(key, seen ? 1.0f : 0.0f);
  }
}

}  // namespace bclip::cuda
