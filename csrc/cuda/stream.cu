#include "csrc/cuda/stream.h"

#include <stdexcept>

#include <cuda_runtime.h>

namespace bclip::cuda {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

cudaEvent_t of(void* event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

StreamMark::~StreamMark() {
  if (event_) cudaEventDestroy(of(event_));
}

void StreamMark::record(void* stream) {
  if (!event_) {
    cudaEvent_t event;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync));
    event_ = event;
  }
  check(cudaEventRecord(of(event_), static_cast<cudaStream_t>(stream)));
}

void StreamMark::wait() {
  if (event_) check(cudaEventSynchronize(of(event_)));
}

}  // namespace bclip::cuda
