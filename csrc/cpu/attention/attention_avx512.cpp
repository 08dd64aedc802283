#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "csrc/cpu/attention/attention_kernels.h"

#ifdef BCLIP_X86_TARGETS
#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics start from an undefined vector
// After the standard headers, whose inline functions are shared with code that runs on every machine.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define BCLIP_AVX512 1
#include "csrc/cpu/attention/attention-inl.h"

namespace bclip::cpu {

const AttentionKernels kAvx512Attention[2] = {HeadKernels<FloatEngine, float>::kernels("avx512"),
                                              HeadKernels<FloatEngine, uint16_t>::kernels("avx512")};

}  // namespace bclip::cpu

#endif
