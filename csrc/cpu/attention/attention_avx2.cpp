#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "csrc/cpu/attention/attention_kernels.h"

#ifdef BCLIP_X86_TARGETS
#include <immintrin.h>

// After the standard headers, whose inline functions are shared with code that runs on every machine.
#pragma GCC target("avx2,fma")
#define BCLIP_AVX2 1
#include "csrc/cpu/attention/attention-inl.h"

namespace bclip::cpu {

const AttentionKernels kAvx2Attention[2] = {HeadKernels<FloatEngine, float>::kernels("avx2"),
                                              HeadKernels<FloatEngine, uint16_t>::kernels("avx2")};

}  // namespace bclip::cpu

#endif
