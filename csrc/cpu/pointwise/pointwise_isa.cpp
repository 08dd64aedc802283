// The pointwise kernels of one instruction set (simd/target.h).
#include "csrc/cpu/pointwise/pointwise_kernels.h"

#include "csrc/cpu/simd/target.h"

#ifdef BCLIP_ISA_AVAILABLE

#include "csrc/cpu/pointwise/pointwise-inl.h"

namespace bclip::cpu::BCLIP_ISA {

const PointwiseKernels kPointwise = {&add_norm, &add_norm_backward, &gelu, &gelu_backward};

}  // namespace bclip::cpu::BCLIP_ISA

#endif
