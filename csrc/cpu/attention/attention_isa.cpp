// The attention kernels of one instruction set (simd/target.h).
#include "csrc/cpu/attention/attention_kernels.h"

#include "csrc/cpu/simd/target.h"

#ifdef BCLIP_ISA_AVAILABLE

#include "csrc/cpu/attention/attention-inl.h"

namespace bclip::cpu::BCLIP_ISA {

const AttentionKernels kFloatAttention = HeadKernels<FloatEngine, float>::kernels();
const AttentionKernels kBfloat16Attention = HeadKernels<FloatEngine, uint16_t>::kernels();

}  // namespace bclip::cpu::BCLIP_ISA

#endif
