// Runs tasks 0 .. count-1 on up to `threads` threads, the caller's among them. Which thread runs a task isn't fixed, so
// a task may write only what belongs to it alone. The first exception of a task is thrown again here.
#pragma once

#include <cstdint>
#include <functional>

namespace bclip::cpu {

void parallel(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace bclip::cpu
