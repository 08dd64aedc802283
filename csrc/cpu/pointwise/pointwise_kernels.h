// The kernels for ranges of rows, compiled once per instruction set and called by pointwise.cpp.
#pragma once

#include <cstdint>

#include "csrc/pointwise.h"
#include "csrc/cpu/simd/isa.h"

namespace bclip::cpu {

// Rows of floats, each as long as a row of the matrix, rounded up to 32.
constexpr int64_t kScratchRows = 5;

struct PointwiseKernels {
  // Rows [first, last).
  void (*add_norm)(const AddNorm&, int64_t first, int64_t last, float* scratch);
  // Adds the contribution of these rows to the gradients of weight and bias, `sums` (2, columns
  // rounded up to 32).
  void (*add_norm_backward)(const AddNormGradient&, int64_t first, int64_t last, float* scratch,
                            float* sums);
  // Values [first, last).
  void (*gelu)(Values x, Values out, int64_t first, int64_t last);
  void (*gelu_backward)(Values grad, Values x, Values out, int64_t first, int64_t last);
};

BCLIP_DECLARE_KERNELS(PointwiseKernels, kPointwise, pointwise_kernels)

}  // namespace bclip::cpu
