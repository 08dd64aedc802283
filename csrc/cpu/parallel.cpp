#include "csrc/cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
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

// The thread team of torch's own operators: the entry point of the OpenMP runtime that torch loads
// for the whole process. It is GCC's entry point, which the runtimes of LLVM and Intel have too.
// Those threads spin for a while after each operator. Other threads would compete with them for the
// cores, which costs a fifth of a training step. Null without torch. Null in a forked child too,
// because the runtime there would wait forever for the parent's threads.
Team team() {
  static const Team entry = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == kLoadedBy ? entry : nullptr;
}
#else
Team team() { return nullptr; }
#endif

// Consecutive tasks. Each thread starts with its range, so that one thread writes neighbouring
// memory. Two threads that write to neighbouring new pages wait for each other, because Linux maps
// the pages one by one. After its range, a thread takes tasks from the other ranges, because their
// threads may share a core with another process.
struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t end;
};

}  // namespace

void parallel(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  const int64_t team_size = std::clamp<int64_t>(threads, 1, std::max<int64_t>(count, 1));
  std::vector<Range> ranges(team_size);
  for (int64_t i = 0; i < team_size; ++i) {
    ranges[i].next = count * i / team_size;
    ranges[i].end = count * (i + 1) / team_size;
  }
  std::atomic<int64_t> arrived{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    const int64_t first = arrived.fetch_add(1);
    try {
      for (int64_t i = 0; i < team_size; ++i) {
        Range& range = ranges[(first + i) % team_size];
        for (int64_t index; !failed && (index = range.next.fetch_add(1)) < range.end;) task(index);
      }
    } catch (...) {
      failed = true;
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  if (const Team run = team_size > 1 ? team() : nullptr) {
    run([](void* work_of_all) { (*static_cast<decltype(work)*>(work_of_all))(); }, &work,
        static_cast<unsigned>(team_size), 0);
  } else {
    std::vector<std::thread> helpers;
    helpers.reserve(std::max<int64_t>(0, team_size));
    try {
      for (int64_t i = 1; i < team_size; ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {
      // The system has no more threads, so the existing ones do the work.
    }
    work();
    for (auto& helper : helpers) helper.join();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace bclip::cpu
