// The gradients on Hopper (hopper.h). Without the headers of CUTLASS this file is empty.
#include "csrc/cuda/contrastive/hopper.h"

#ifdef BCLIP_CUTLASS

#include "csrc/cuda/contrastive/hopper.cuh"
#include "csrc/cuda/contrastive/wide_gradient.cuh"

namespace bclip::cuda {

struct HopperSoftmax {
  static constexpr int kBytes = kWideGradientBytes;
  Features features;
  Normalizers normalizers;
  GradientTile tile;

  __device__ __forceinline__ void operator()(float (&numbers)[WideNumbers::kCount],
                                             const TilePlace& place, int thread, int base) const {
    wide_softmax(numbers, features, normalizers, tile, place, thread, base);
  }
};

struct HopperSigmoid {
  static constexpr int kBytes = kWideGradientBytes;
  Features features;
  const float* bias;
  GradientTile tile;

  __device__ __forceinline__ void operator()(float (&numbers)[WideNumbers::kCount],
                                             const TilePlace& place, int thread, int base) const {
    wide_sigmoid(numbers, features, bias, tile, place, thread, base);
  }
};

int hopper_gradient_bytes() {
  return HopperKernel<cutlass::half_t, HopperSoftmax>::Kernel::SharedStorageSize;
}

void hopper_softmax(const Features& features, const Normalizers& normalizers,
                    const GradientTile& tile) {
  run_on_hopper(HopperSoftmax{features, normalizers, tile});
}

void hopper_sigmoid(const Features& features, const float* bias, const GradientTile& tile) {
  run_on_hopper(HopperSigmoid{features, bias, tile});
}

}  // namespace bclip::cuda

#elif !defined(BCLIP_CUDA_EMULATOR)

#include <stdexcept>

namespace bclip::cuda {

int hopper_gradient_bytes() { return 0; }
void hopper_softmax(const Features&, const Normalizers&, const GradientTile&) {
  throw std::runtime_error("the module was built without the kernels for Hopper");
}
void hopper_sigmoid(const Features&, const float*, const GradientTile&) {
  throw std::runtime_error("the module was built without the kernels for Hopper");
}

}  // namespace bclip::cuda
#endif
