// The properties of the GPUs, for `bclip doctor`.
#pragma once

#include <string>

namespace bclip::cuda {

struct Device {
  std::string name;
  int major;  // compute capability
  int minor;
  size_t memory_bytes;
  int block_bytes;      // shared memory that a block of threads may request
  std::string refusal;  // the reason why this build's kernels can't run on the device, or empty
};

// Both throw std::runtime_error with the driver's reason if a usable driver or device is missing.
// A call of device() creates a context, which takes several hundred MiB of the device's memory. So
// a process should call it only for the device that it uses.
Device device(int index);
int count_devices();

}  // namespace bclip::cuda
