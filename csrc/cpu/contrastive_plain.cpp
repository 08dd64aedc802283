// The kernels for whatever the compiler targets by itself.
#define BCLIP_PLAIN
#include "contrastive_tile.h"

namespace bclip::cpu {

const ContrastiveKernels kPlainKernels = {"plain", &::exponential_sums, &::softmax_gradient, &::sigmoid_gradient};

}  // namespace bclip::cpu
