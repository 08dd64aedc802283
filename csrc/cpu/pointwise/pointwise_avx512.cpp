#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/cpu/pointwise/pointwise_kernels.h"

#ifdef BCLIP_X86_TARGETS
#include <immintrin.h>

// After the standard headers, whose inline functions are shared with code that runs on every machine.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define BCLIP_AVX512 1
#include "csrc/cpu/pointwise/pointwise-inl.h"

namespace bclip::cpu {

const PointwiseKernels kAvx512Pointwise = {&::add_norm, &::add_norm_backward, &::gelu, &::gelu_backward};

}  // namespace bclip::cpu

#endif
