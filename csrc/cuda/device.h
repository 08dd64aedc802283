// What the CUDA module can say of the machine, for `bclip doctor`.
#pragma once

#include <string>

namespace bclip::cuda {

struct Device {
  std::string name;
  int major;             // compute capability
  int minor;
  size_t memory_bytes;
  int block_bytes;       // of shared memory that a block of threads may ask for
  std::string refusal;   // why this build's kernels cannot run on it; empty when they can
};

// Both throw std::runtime_error with the driver's reason when there is no usable driver or device. To know the refusal
// takes a context, some hundred MiB of the device's memory: a process that works on one device asks for that one.
Device device(int index);
int count_devices();

}  // namespace bclip::cuda
