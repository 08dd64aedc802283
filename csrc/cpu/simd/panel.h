// Panels: 32 rows, or 32 columns, of a matrix. Matrices are padded to whole panels.
#pragma once

#include "csrc/cpu/simd/target.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

constexpr int64_t kPanel = 32;

BCLIP_INLINE int64_t panels_of(int64_t size) { return (size + kPanel - 1) / kPanel; }
BCLIP_INLINE int64_t padded(int64_t size) { return panels_of(size) * kPanel; }

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
