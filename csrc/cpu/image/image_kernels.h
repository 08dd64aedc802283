// Resampling of rows of RGB bytes, compiled once per instruction set and called by image.cpp.
//
// The arithmetic equals Pillow's bit for bit. Coefficients are rounded to 22 binary places. A pass
// sums their products with bytes in 32 bits, adds one half, shifts and clamps to a byte. The first
// pass is along the rows, the second across them.
#pragma once

#include <cstdint>

#include "csrc/cpu/simd/isa.h"

namespace bclip::cpu {

constexpr int kPrecision = 22;
constexpr int kRowsAtOnce = 4;
constexpr int kPadding = 64;  // bytes beyond a row that kernels may read and write

// The coefficients of four neighbouring pixels, in the kernel's own format.
struct Quad {
  int32_t words[4];
};

// One axis: output i is the sum over `num_quads` quads of source pixels, which begin at `first[i]`.
// Pixels outside the window of an output have the coefficient 0. Along rows, `first` counts groups
// of four pixels, and `count` is a multiple of four.
struct Taps {
  const int* first;
  const Quad* quads;
  int count;
  int num_quads;
};

struct ResampleKernels {
  Quad (*pack)(const int32_t* coefficients);
  // Resamples four rows to four rows of taps.count RGB pixels. `groups` is scratch: 64 bytes for
  // each four source pixels.
  void (*along)(const uint8_t* const* rows, const Taps& taps, int num_groups, uint8_t* groups,
                uint8_t* const* out);
  // Resamples 4 * num_quads rows of `size` bytes to one row.
  void (*across)(const uint8_t* const* rows, const Quad* quads, int num_quads, int64_t size,
                 uint8_t* out);
};

// The source file of each instruction set defines its own kernels. On AVX-512 without VNNI the
// kernels of AVX2 run.
namespace portable {
extern const ResampleKernels kResample;
}
#ifdef BCLIP_X86_TARGETS
namespace avx2 {
extern const ResampleKernels kResample;
}
namespace vnni {
extern const ResampleKernels kResample;
}
#endif

}  // namespace bclip::cpu
