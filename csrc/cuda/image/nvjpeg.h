// nvJPEG. It is loaded at its first use, so neither the build nor the import needs it. The
// declarations in nvjpeg.cpp follow the documentation of CUDA 12 and 13.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/cuda/stream.h"

namespace bclip::cuda {

// (height, width) of each file that nvJPEG decodes like libjpeg, on all of its backends. Such a
// file is complete, and baseline with 8 bits in one scan. Its colours are grey, or YCbCr with luma
// of full size. (0, 0) for any other file.
std::vector<std::pair<int, int>> plain_jpegs(const std::vector<std::string_view>& files);

// A decoder on the current device. Calls from several threads run one after another. A call first
// waits for the work of the last one, on whatever stream, because both use the same memory.
class NvJpeg {
 public:
  // Throws std::runtime_error if the library doesn't exist or finds no usable device.
  explicit NvJpeg(const std::string& path);
  NvJpeg(const NvJpeg&) = delete;
  ~NvJpeg();

  // Writes rows of 3 * width bytes to pixels[i] in device memory, in the order of `stream`. The
  // files must outlive that work. Returns the indices of the files that it refused, whose pixels
  // are undefined.
  std::vector<int64_t> decode(const std::vector<std::string_view>& files,
                              const std::vector<uint8_t*>& pixels, const std::vector<int>& widths,
                              int threads, void* stream);

 private:
  struct Functions;
  struct Image;
  std::vector<int> decode_with_states(const std::vector<const unsigned char*>& files,
                                      const std::vector<size_t>& lengths,
                                      std::vector<Image>& images, int threads, void* stream);
  void release();

  std::mutex mutex_;
  const Functions* functions_;
  void* handle_ = nullptr;
  void* states_[2] = {};  // for batches, and for single files
  StreamMark last_work_;
};

}  // namespace bclip::cuda
