#include "csrc/cuda/device.h"

#include <stdexcept>

#include <cuda_runtime.h>

namespace bclip::cuda {
namespace {

// This kernel is compiled for every architecture of the build. A device without an image of it can
// run none of our kernels.
__global__ void probe() {}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace

Device device(int index) {
  int before = 0;
  check(cudaGetDevice(&before));
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index));
  // cudaSetDevice creates a context, so it is called only for a device other than the current one.
  if (index != before) check(cudaSetDevice(index));
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error != cudaSuccess) cudaGetLastError();
  if (index != before) check(cudaSetDevice(before));
  return {properties.name,
          properties.major,
          properties.minor,
          properties.totalGlobalMem,
          static_cast<int>(properties.sharedMemPerBlockOptin),
          error == cudaSuccess ? "" : cudaGetErrorString(error)};
}

int count_devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  return count;
}

}  // namespace bclip::cuda
