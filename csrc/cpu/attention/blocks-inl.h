// Blocks of 32 x 32, in which the attention kernels keep all matrices, and the part of a product
// that counts.
#pragma once

#include "csrc/cpu/simd/panel.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

constexpr int64_t kBlock = kPanel * kPanel;

// How much of `size` falls into panel `index`.
BCLIP_INLINE int64_t within(int64_t size, int64_t index) {
  return std::min(kPanel, size - index * kPanel);
}

// The part of a product that counts. The rest of its blocks is padding.
struct Extent {
  int64_t rows, columns, depth;
};

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
