// The resampling that image.cpp runs on rows of RGB bytes, compiled once per instruction set.
//
// Pillow's arithmetic, to the bit: coefficients are rounded to 22 binary places, a pass sums their products with bytes in
// 32 bits, adds a half, shifts and clamps to a byte; rows are resampled along their length first, then one below another.
#pragma once

#include <cstdint>

#include "csrc/cpu/contrastive/contrastive_kernels.h"

namespace bclip::cpu {

constexpr int kPrecision = 22;
constexpr int kRowsAtOnce = 4;
constexpr int kPadding = 64;  // bytes that may be read and written beyond a row

// The coefficients of four neighbouring pixels, in the form that a kernel multiplies by.
struct Quad {
  int32_t words[4];
};

// One axis: output i is the sum of `num_quads` quads of source pixels, the first of them at `first[i]`; coefficients of
// pixels outside of its window are 0. Along rows `first` counts groups of four pixels, and `count` is a multiple of four.
struct Taps {
  const int* first;
  const Quad* quads;
  int count;
  int num_quads;
};

struct ResampleKernels {
  Quad (*pack)(const int32_t* coefficients);
  // Four rows to four rows of taps.count RGB pixels; `groups` holds 64 bytes for each four pixels that taps reach.
  void (*along)(const uint8_t* const* rows, const Taps& taps, int num_groups, uint8_t* groups, uint8_t* const* out);
  // 4 * num_quads rows of `size` bytes to one.
  void (*across)(const uint8_t* const* rows, const Quad* quads, int num_quads, int64_t size, uint8_t* out);
};

extern const ResampleKernels kPlainResample;
#ifdef BCLIP_X86_TARGETS
extern const ResampleKernels kAvx2Resample, kVnniResample;
#endif

}  // namespace bclip::cpu
