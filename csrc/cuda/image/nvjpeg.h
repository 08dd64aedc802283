// nvJPEG, loaded when first wanted: no build and no start needs it. Its functions are declared in nvjpeg.cpp, as the
// documentation of CUDA 12 and 13 has them.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace bclip::cuda {

// (height, width) of each file that nvJPEG may be given; (0, 0) of any that some backend of it can't decode, or decodes
// otherwise than libjpeg: not baseline of 8 bits in one scan, not grey or YCbCr with luma of full size, or truncated.
std::vector<std::pair<int, int>> plain_jpegs(const std::vector<std::string_view>& files);

// On the device that is current; a call waits for one before it on another thread.
class NvJpeg {
 public:
  // Throws std::runtime_error when there is no such library, or it finds no device it can use.
  explicit NvJpeg(const std::string& path);
  NvJpeg(const NvJpeg&) = delete;
  ~NvJpeg();

  // Writes rows of 3 * width bytes from pixels[i] on, of the device's memory, in the order of `stream`: the files must
  // stay until that is through. Returns the indices that it refused, whose pixels may be anything.
  std::vector<int64_t> decode(const std::vector<std::string_view>& files, const std::vector<uint8_t*>& pixels,
                              const std::vector<int>& widths, int threads, void* stream);

 private:
  struct Functions;
  void release();

  std::mutex mutex_;
  const Functions* functions_;
  void* handle_ = nullptr;
  void* states_[2] = {};  // of batches, of single files
};

}  // namespace bclip::cuda
