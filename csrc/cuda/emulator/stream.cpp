// The streams of the emulator. Kernels run at once, so only libraries have work on a stream. Such a
// stream starts with the address of a function that runs all of its work. The null stream has none.
#include "csrc/cuda/stream.h"

namespace bclip::cuda {

StreamMark::~StreamMark() = default;

void StreamMark::record(void* stream) { event_ = stream; }

void StreamMark::wait() {
  if (event_) (**static_cast<void (**)(void*)>(event_))(event_);
}

}  // namespace bclip::cuda
