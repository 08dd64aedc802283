// The kernels for whatever the compiler targets by itself.
#include "csrc/cpu/attention/attention-inl.h"

namespace bclip::cpu {

const AttentionKernels kPlainAttention[2] = {HeadKernels<FloatEngine, float>::kernels("plain"),
                                             HeadKernels<FloatEngine, uint16_t>::kernels("plain")};

}  // namespace bclip::cpu
