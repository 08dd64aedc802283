// The contrastive operators on Hopper (sm_90a): the main loop of CUTLASS, whose multiplications
// take 64 x 256 numbers at a time and whose operands come through the tensor memory accelerator,
// then the epilogues of wide_tile.cuh. A tile is 128 x 256, and two tiles of the same columns share
// the text features by multicast. Contract and structs are those of contrastive.h, with tiles of
// this size. Calls with groups take the kernels of contrastive.h.
#pragma once

#include "csrc/cuda/contrastive/contrastive.h"

namespace bclip::cuda {

constexpr int kHopperRows = 128, kHopperColumns = 256;

// Whether the kernels were built: with the headers of CUTLASS, and for sm_90a.
constexpr bool kHasHopper =
#if defined(BCLIP_CUTLASS) || defined(BCLIP_CUDA_EMULATOR)
    true;
#else
    false;
#endif

// Threads of a block, and its bytes of shared memory. 0 if the kernels weren't built.
constexpr int kHopperThreads = 384;
int hopper_forward_bytes();
int hopper_gradient_bytes();

// PartialSums of tiles of 128 x 256: rows (ceil(B / 256), b), columns (ceil(b / 128), B). All throw
// std::runtime_error with the reason if the device or the driver can't run the kernel.
void hopper_forward(const Features& features, const PartialSums& sums);
void hopper_softmax(const Features& features, const Normalizers& normalizers,
                    const GradientTile& tile);
// `bias` () or null.
void hopper_sigmoid(const Features& features, const float* bias, const GradientTile& tile);

}  // namespace bclip::cuda
