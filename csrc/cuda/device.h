// What the CUDA module can say of the machine, for `bclip doctor`.
#pragma once

#include <string>
#include <vector>

namespace bclip::cuda {

struct Device {
  std::string name;
  int major;             // compute capability
  int minor;
  size_t memory_bytes;
  std::string refusal;   // why this build's kernels cannot run on it; empty when they can
};

// Throws std::runtime_error with the driver's reason when there is no usable driver or device.
std::vector<Device> devices();

}  // namespace bclip::cuda
