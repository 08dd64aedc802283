// The contrastive kernels of one instruction set (simd/target.h).
#include "csrc/cpu/contrastive/contrastive_kernels.h"

#include "csrc/cpu/simd/target.h"

#ifdef BCLIP_ISA_AVAILABLE

#include "csrc/cpu/contrastive/contrastive-inl.h"

namespace bclip::cpu::BCLIP_ISA {

const ContrastiveKernels kContrastive = {&exponential_sums, &softmax_gradient, &sigmoid_gradient};

}  // namespace bclip::cpu::BCLIP_ISA

#endif
