#include "csrc/cuda/device.h"

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

Device device(int index) {
  int before = 0;
  check(cudaGetDevice(&before));
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index));
  // Where it is the current one already, as in a process that works on one, nothing is set: setting makes a context.
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
