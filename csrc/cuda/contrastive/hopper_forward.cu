// The forward pass on Hopper (hopper.h). Without the headers of CUTLASS this file is empty.
#include "csrc/cuda/contrastive/hopper.h"

#ifdef BCLIP_CUTLASS

#include "csrc/cuda/contrastive/hopper.cuh"
#include "csrc/cuda/contrastive/wide_forward.cuh"

namespace bclip::cuda {

struct HopperForward {
  static constexpr int kBytes = kWideForwardBytes;
  Features features;
  PartialSums sums;

  __device__ __forceinline__ void operator()(float (&numbers)[WideNumbers::kCount],
                                             const TilePlace& place, int thread, int base) const {
    wide_forward(numbers, features, sums, place, thread, base);
  }
};

int hopper_forward_bytes() {
  return HopperKernel<cutlass::half_t, HopperForward>::Kernel::SharedStorageSize;
}

void hopper_forward(const Features& features, const PartialSums& sums) {
  run_on_hopper(HopperForward{features, sums});
}

}  // namespace bclip::cuda

#elif !defined(BCLIP_CUDA_EMULATOR)

#include <stdexcept>

namespace bclip::cuda {

int hopper_forward_bytes() { return 0; }
void hopper_forward(const Features&, const PartialSums&) {
  throw std::runtime_error("the module was built without the kernels for Hopper");
}

}  // namespace bclip::cuda
#endif
