#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/cpu/contrastive/contrastive_kernels.h"

#ifdef BCLIP_X86_TARGETS
#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics start from an undefined vector
// After the standard headers, whose inline functions are shared with code that runs on every machine.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define BCLIP_AVX512 1
#include "csrc/cpu/contrastive/contrastive-inl.h"

namespace bclip::cpu {

const ContrastiveKernels kAvx512Kernels = {"avx512", &::exponential_sums, &::softmax_gradient, &::sigmoid_gradient};

}  // namespace bclip::cpu

#endif
