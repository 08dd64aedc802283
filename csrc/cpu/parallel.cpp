#include "csrc/cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace bclip::cpu {

namespace {

using Team = void (*)(void (*function)(void*), void* argument, unsigned threads, unsigned flags);

#ifdef __linux__
const pid_t kLoadedBy = getpid();

// The threads of torch's own operators, by the entry point of the OpenMP runtime that torch loads for the whole process
// (GCC's, which LLVM's and Intel's have too). They wait actively for a while after each operator, and threads of ours
// would share the cores with them: a fifth of a training step. None without torch; none in a forked child either, where
// the runtime takes the parent's threads for its own and would wait for them forever.
Team team() {
  static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == kLoadedBy ? found : nullptr;
}
#else
Team team() { return nullptr; }
#endif

// Consecutive tasks. Each thread begins with a range of its own, so that neighbours in memory are written by one thread
// (two that write to new memory side by side wait for one another in the kernel, which maps it page by page), and then
// takes what is left of the others', so that none waits for a thread that shares its core with another process.
struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t end;
};

}  // namespace

void parallel(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  const int64_t wanted = std::clamp<int64_t>(threads, 1, std::max<int64_t>(count, 1));
  std::vector<Range> ranges(wanted);
  for (int64_t i = 0; i < wanted; ++i) {
    ranges[i].next = count * i / wanted;
    ranges[i].end = count * (i + 1) / wanted;
  }
  std::atomic<int64_t> arrived{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    const int64_t own = arrived.fetch_add(1);
    try {
      for (int64_t i = 0; i < wanted; ++i) {
        Range& range = ranges[(own + i) % wanted];
        for (int64_t index; !failed && (index = range.next.fetch_add(1)) < range.end;) task(index);
      }
    } catch (...) {
      failed = true;
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  if (const Team run = wanted > 1 ? team() : nullptr) {
    run([](void* work_of_all) { (*static_cast<decltype(work)*>(work_of_all))(); }, &work,
        static_cast<unsigned>(wanted), 0);
  } else {
    std::vector<std::thread> helpers;
    helpers.reserve(std::max<int64_t>(0, wanted));
    try {
      for (int64_t i = 1; i < wanted; ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {
      // No more threads to be had: those there are do the work.
    }
    work();
    for (auto& helper : helpers) helper.join();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace bclip::cpu
