// Runs the tasks 0 to count - 1 on up to `threads` threads, one of them the caller's. Any thread
// may run any task, so no two tasks may write the same memory. Rethrows the first exception of a
// task.
#pragma once

#include <cstdint>
#include <functional>

namespace bclip::cpu {

void parallel(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace bclip::cpu
