#include "device.h"

#include <stdexcept>

#include <cuda_runtime.h>

namespace bclip::cuda {
namespace {

// Compiled for every architecture of the build: a device that has no image of it can run none of our kernels.
__global__ void probe() {}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace

std::vector<Device> devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  int before = 0;
  check(cudaGetDevice(&before));
  std::vector<Device> found;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, index));
    check(cudaSetDevice(index));
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
    if (error != cudaSuccess) cudaGetLastError();
    found.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem,
                     error == cudaSuccess ? "" : cudaGetErrorString(error)});
  }
  check(cudaSetDevice(before));
  return found;
}

}  // namespace bclip::cuda
