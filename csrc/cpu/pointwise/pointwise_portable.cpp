// The kernels for whatever the compiler targets by itself.
#include "csrc/cpu/pointwise/pointwise-inl.h"

namespace bclip::cpu {

const PointwiseKernels kPlainPointwise = {&::add_norm, &::add_norm_backward, &::gelu, &::gelu_backward};

}  // namespace bclip::cpu
