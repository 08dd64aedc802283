#include "csrc/cpu/simd/scratch.h"

#include <memory>

namespace bclip::cpu {

char* thread_scratch(int64_t bytes) {
  constexpr std::align_val_t line{64};
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, line); }
  };
  static thread_local std::unique_ptr<char[], Free> memory;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(new (line) char[bytes]);
    size = bytes;
  }
  return memory.get();
}

}  // namespace bclip::cpu
