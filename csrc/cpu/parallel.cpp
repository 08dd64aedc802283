#include "parallel.h"

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

}  // namespace

void parallel(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    try {
      for (int64_t index; (index = next.fetch_add(1)) < count;) task(index);
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  const int64_t wanted = std::min<int64_t>(threads, count);
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
