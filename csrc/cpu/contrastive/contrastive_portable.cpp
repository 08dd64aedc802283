// The kernels for whatever the compiler targets by itself.
#include "csrc/cpu/contrastive/contrastive-inl.h"

namespace bclip::cpu {

const ContrastiveKernels kPlainKernels = {"plain", &::exponential_sums, &::softmax_gradient, &::sigmoid_gradient};

}  // namespace bclip::cpu
