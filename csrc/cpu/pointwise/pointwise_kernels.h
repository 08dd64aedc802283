// What pointwise.cpp runs on blocks of rows, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "csrc/pointwise.h"
#include "csrc/cpu/contrastive/contrastive_kernels.h"

namespace bclip::cpu {

constexpr int64_t kScratchRows = 5;  // of floats, each as long as a row of the matrix, rounded up to 32

struct PointwiseKernels {
  // Rows [first, last).
  void (*add_norm)(const AddNorm&, int64_t first, int64_t last, float* scratch);
  // Adds the rows' part of the weight's and the bias's gradient to (2, columns rounded up to 32) `sums`.
  void (*add_norm_backward)(const AddNormGradient&, int64_t first, int64_t last, float* scratch, float* sums);
  // Values [first, last).
  void (*gelu)(Values x, Values out, int64_t first, int64_t last);
  void (*gelu_backward)(Values grad, Values x, Values out, int64_t first, int64_t last);
};

extern const PointwiseKernels kPlainPointwise;
#ifdef BCLIP_X86_TARGETS
extern const PointwiseKernels kAvx2Pointwise, kAvx512Pointwise;
#endif

}  // namespace bclip::cpu
