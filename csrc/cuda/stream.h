// Work that is still running on a stream.
#pragma once

namespace bclip::cuda {

// A place in a stream. Its thread-safety is that of an int. The device of its first record() must
// be the current one at every later call.
class StreamMark {
 public:
  StreamMark() = default;
  StreamMark(const StreamMark&) = delete;
  ~StreamMark();

  // Marks the end of the work that `stream` has been given so far. It replaces an earlier mark.
  void record(void* stream);

  // Returns when the work before the mark is done, or at once without a mark.
  void wait();

  // Both throw std::runtime_error with CUDA's reason.

 private:
  void* event_ = nullptr;
};

}  // namespace bclip::cuda
