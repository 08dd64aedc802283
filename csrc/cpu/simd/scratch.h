// Working memory of a thread.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <new>

namespace bclip::cpu {

// Memory of the calling thread: at least `bytes` bytes, aligned to 64. A later call may move it.
char* thread_scratch(int64_t bytes);

// Hands out pieces of a scratch, each aligned to 64 bytes. Without memory it only counts the bytes.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    char* const piece = memory_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* const memory_;
  int64_t used_ = 0;
};

// Zeroed memory, in large pages if the kernel has them.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(std::max<int64_t>(count, 1) * sizeof(T)) {
    void* memory =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef __linux__
    madvise(memory, bytes_, MADV_HUGEPAGE);
#endif
    data = static_cast<T*>(memory);
  }
  ~Scratch() { munmap(data, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data;

 private:
  const size_t bytes_;
};

}  // namespace bclip::cpu
