#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/cpu/contrastive/contrastive_kernels.h"

#ifdef BCLIP_X86_TARGETS
#include <immintrin.h>

// After the standard headers, whose inline functions are shared with code that runs on every machine.
#pragma GCC target("avx2,fma")
#define BCLIP_AVX2 1
#include "csrc/cpu/contrastive/contrastive-inl.h"

namespace bclip::cpu {

const ContrastiveKernels kAvx2Kernels = {"avx2", &::exponential_sums, &::softmax_gradient, &::sigmoid_gradient};

}  // namespace bclip::cpu

#endif
