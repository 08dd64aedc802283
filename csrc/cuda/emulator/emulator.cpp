#include "csrc/cuda/emulator/emulator.h"
#include "csrc/cuda/emulator/counters.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// AddressSanitizer's functions (sanitizer/common_interface_defs.h), null in a build without it.
extern "C" [[gnu::weak]] void __sanitizer_start_switch_fiber(void**, const void*, size_t);
extern "C" [[gnu::weak]] void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);

#ifndef __x86_64__
#error "The CUDA emulator, which only tests use, switches stacks on x86-64."
#endif

// void bclip_switch(void** from, void* to): saves the registers that the System V ABI reserves for
// the caller, and switches stacks.
asm(R"(
.text
.type bclip_switch, @function
bclip_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size bclip_switch, . - bclip_switch
)");
extern "C" void bclip_switch(void** from, void* to) asm("bclip_switch");

namespace bclip::cuda::emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int16_t kSeveral = -2, kWholeWarp = -3;

struct Copy {
  int64_t byte;
  const void* from;
  size_t size;
};

struct Fiber {
  std::unique_ptr<char[]> memory = std::make_unique<char[]>(kStackBytes);
  void* stack = nullptr;
  void* fake_stack = nullptr;
  bool ended = false;
  Site site{};
  const char* name = "";
  void* brought = nullptr;
  std::vector<std::vector<Copy>> copies;  // the last group is still open
};

// The last write and the last reads of two bytes of shared memory. `read_warp` is the warp that
// read since the last barrier of the block, or kSeveral. `reader` is the thread that read since the
// last barrier of that warp, or kSeveral. Epochs only rise, so that cells of earlier blocks are
// recognised and need no reset.
struct Cell {
  uint32_t write_block_epoch, write_warp_epoch;
  uint32_t read_block_epoch, read_warp_epoch;
  int16_t writer, reader, read_warp;
  bool in_flight;
};

// The state of the block that runs. Each thread of the process has its own emulator.
struct Emulator {
  static Emulator& current();

  std::vector<Fiber> fibers;
  std::vector<int> ready;
  int running = 0, threads = 0, block_waiting = 0;
  int64_t block = 0;
  std::vector<int> warp_waiting;
  std::vector<uint32_t> warp_epochs;
  uint32_t block_epoch = 0, first_epoch = 0;  // first_epoch: of this block
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  void *stack = nullptr, *fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
  bool from_main = false;  // whether the last switch was to a fiber from run_block()
  uint64_t random = 1;
};

// Access through a plain pointer costs no call, unlike a thread_local object of a shared library.
[[gnu::tls_model("initial-exec")]] thread_local Emulator* current_emulator = nullptr;

Emulator& make_emulator() {
  static thread_local Emulator emulator;
  return *(current_emulator = &emulator);
}

Emulator& Emulator::current() { return current_emulator ? *current_emulator : make_emulator(); }

// The next random number: SplitMix64 (Steele, Lea and Flood 2014).
uint64_t draw() {
  uint64_t z = (Emulator::current().random += 0x9e3779b97f4a7c15);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}
// A random number in [0, count).
size_t draw_below(size_t count) { return size_t((draw() >> 32) * count >> 32); }

Fiber& self() { return Emulator::current().fibers[Emulator::current().running]; }

bool is_same(Site one, Site other) {
  return one.line == other.line && (one.file == other.file || !std::strcmp(one.file, other.file));
}

std::string at(Site site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

[[noreturn]] void fail(Site site, const std::string& what) {
  Emulator& state = Emulator::current();
  throw std::runtime_error(at(site) + ": block " + std::to_string(state.block) + ", thread " +
                           std::to_string(state.running) + ": " + what);
}

// Called on the stack of the fiber that starts or continues.
void arrive(void* fake_stack) {
  Emulator& state = Emulator::current();
  const bool from_main = std::exchange(state.from_main, false);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(fake_stack, from_main ? &state.bottom : nullptr,
                                    from_main ? &state.bytes : nullptr);
  }
}

// Takes a random fiber from those that are ready, to run next.
Fiber& choose() {
  Emulator& state = Emulator::current();
  std::swap(state.ready[draw_below(state.ready.size())], state.ready.back());
  state.running = state.ready.back();
  state.ready.pop_back();
  return self();
}

// Switches to a fiber that is ready. Without one, or after an error, switches back to run_block().
void leave() {
  Emulator& state = Emulator::current();
  Fiber& fiber = self();
  const bool to_main = state.ready.empty() || state.error;
  Fiber& next = to_main ? fiber : choose();
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&fiber.fake_stack, to_main ? state.bottom : next.memory.get(),
                                   to_main ? state.bytes : kStackBytes);
  }
  bclip_switch(&fiber.stack, to_main ? state.stack : next.stack);
  arrive(self().fake_stack);
}

void start() {
  Emulator& state = Emulator::current();
  arrive(nullptr);
  try {
    (*state.body)();
    for (const auto& group : self().copies) {
      if (!group.empty()) throw std::runtime_error("a thread ended without waiting for its copies");
    }
  } catch (...) {
    state.error = std::current_exception();
  }
  self().ended = true;
  leave();
  std::abort();
}

void prepare(Fiber& fiber) {
  const auto top = (reinterpret_cast<uintptr_t>(fiber.memory.get()) + kStackBytes) & ~uintptr_t(15);
  void** slot = reinterpret_cast<void**>(top) - 2;
  *slot = reinterpret_cast<void*>(&start);
  fiber.stack = slot - 6;
  fiber.ended = false;
  fiber.copies.assign(1, {});
}

void enter(Fiber& fiber) {
  Emulator& state = Emulator::current();
  state.from_main = true;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&state.fake_stack, fiber.memory.get(), kStackBytes);
  bclip_switch(&state.stack, fiber.stack);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(state.fake_stack, nullptr, nullptr);
}

std::string describe_waiting() {
  Emulator& state = Emulator::current();
  std::string result;
  for (int thread = 0; thread < state.threads; ++thread) {
    const Fiber& fiber = state.fibers[thread];
    if (fiber.ended) continue;
    result += result.empty() ? "" : ", ";
    result += "thread " + std::to_string(thread) + " at " + fiber.name + " in " + at(fiber.site);
    if (result.size() > 300) return result + " ...";
  }
  return result;
}

void run_block() {
  Emulator& state = Emulator::current();
  std::fill(state.shared.begin(), state.shared.end(), 0xff);  // NaN in every floating type
  state.block_waiting = 0;
  state.first_epoch = ++state.block_epoch;
  state.warp_waiting.assign(state.threads / 32, 0);
  state.warp_epochs.assign(state.threads / 32, 1);
  state.ready.resize(state.threads);
  std::iota(state.ready.begin(), state.ready.end(), 0);
  for (int thread = 0; thread < state.threads; ++thread) prepare(state.fibers[thread]);
  while (!state.ready.empty()) {
    enter(choose());
    if (state.error) std::rethrow_exception(std::exchange(state.error, nullptr));
  }
  const std::string waiting = describe_waiting();
  if (!waiting.empty()) {
    throw std::runtime_error("block " + std::to_string(state.block) +
                             ": threads wait for others that ended or wait elsewhere: " + waiting);
  }
}

template <class Visit>
void each_cell(Site site, int64_t byte, size_t size, Visit&& visit) {
  Emulator& state = Emulator::current();
  if (byte < 0 || byte + int64_t(size) > int64_t(state.shared.size())) {
    fail(site, "byte " + std::to_string(byte) + " is outside the " +
                   std::to_string(state.shared.size()) + " bytes of shared memory");
  }
  if (byte % int64_t(size))
    fail(site, "byte " + std::to_string(byte) + " isn't a multiple of the access's size");
  for (int64_t cell = byte / 2; cell < (byte + int64_t(size) + 1) / 2; ++cell)
    visit(state.cells[cell]);
}

[[noreturn, gnu::cold]] void fail_after_write(Site site, const Cell& cell, bool reading) {
  const std::string verb = reading ? "reads" : "writes";
  fail(site, cell.in_flight ? verb + " what a copy is still to write: wait_for_copies is missing"
                            : verb + " what thread " + std::to_string(cell.writer) +
                                  " wrote: a barrier is missing");
}

inline void check_write_before(Site site, const Cell& cell, int thread, bool reading) {
  Emulator& state = Emulator::current();
  if (cell.write_block_epoch < state.first_epoch) {
    if (reading) fail(site, "reads shared memory that nobody wrote");
    return;
  }
  const int warp = state.running / 32;
  const bool ordered =
      cell.writer == thread || cell.write_block_epoch != state.block_epoch ||
      (cell.writer / 32 == warp && cell.write_warp_epoch != state.warp_epochs[warp]);
  if (!ordered || cell.in_flight) fail_after_write(site, cell, reading);
}

inline void check_reads_before(Site site, const Cell& cell, int thread) {
  Emulator& state = Emulator::current();
  if (cell.read_block_epoch != state.block_epoch) return;
  const int warp = state.running / 32;
  const bool ordered = cell.read_warp == warp &&
                       (cell.read_warp_epoch != state.warp_epochs[warp] || cell.reader == thread);
  if (!ordered) fail(site, "overwrites what others may still read: a barrier is missing");
}

void note_read(Site site, int64_t byte, size_t size, int16_t thread) {
  Emulator& state = Emulator::current();
  const int16_t warp = static_cast<int16_t>(state.running / 32);
  const uint32_t warp_epoch = state.warp_epochs[warp];
  each_cell(site, byte, size, [&](Cell& cell) {
    check_write_before(site, cell, thread, true);
    const bool first = cell.read_block_epoch != state.block_epoch;
    if (first || (cell.read_warp == warp && cell.read_warp_epoch != warp_epoch)) {
      cell.reader = thread;
    } else if (cell.reader != thread) {
      cell.reader = kSeveral;
    }
    cell.read_warp = first || cell.read_warp == warp ? warp : kSeveral;
    cell.read_block_epoch = state.block_epoch;
    cell.read_warp_epoch = warp_epoch;
  });
}

void note_write(Site site, int64_t byte, size_t size, bool in_flight) {
  Emulator& state = Emulator::current();
  const uint32_t warp_epoch = state.warp_epochs[state.running / 32];
  each_cell(site, byte, size, [&](Cell& cell) {
    check_write_before(site, cell, state.running, false);
    check_reads_before(site, cell, state.running);
    cell = {state.block_epoch, warp_epoch, 0, 0, static_cast<int16_t>(state.running), 0, 0,
            in_flight};
  });
}

}  // namespace

int thread() { return Emulator::current().running; }
int64_t block() { return Emulator::current().block; }
int threads() { return Emulator::current().threads; }

void meet_block(Site site) {
  Emulator& state = Emulator::current();
  Fiber& fiber = self();
  fiber.site = site;
  fiber.name = "block_barrier";
  if (++state.block_waiting < state.threads) return leave();
  for (int other = 0; other < state.threads; ++other) {
    const Site other_site = state.fibers[other].site;
    if (!is_same(other_site, site)) {
      fail(site, "thread " + std::to_string(other) + " meets this barrier at " + at(other_site));
    }
    if (other != state.running) state.ready.push_back(other);
  }
  state.block_waiting = 0;
  ++state.block_epoch;
  if (counting) {
    for (int warp = 0; warp < state.threads / 32; ++warp) end_counted_warp(warp);
  }
}

void meet_warp(Site site, const char* name, void* brought, void (*act)(void* const (&all)[32])) {
  Emulator& state = Emulator::current();
  const int warp = state.running / 32;
  Fiber& fiber = self();
  fiber.site = site;
  fiber.name = name;
  fiber.brought = brought;
  if (++state.warp_waiting[warp] < 32) return leave();
  void* all[32];
  for (int lane = 0; lane < 32; ++lane) {
    const Fiber& other = state.fibers[warp * 32 + lane];
    if (!is_same(other.site, site) || (other.name != name && std::strcmp(other.name, name))) {
      fail(site, std::string(name) + " meets lane " + std::to_string(lane) + " at " + other.name +
                     " in " + at(other.site) + ": the warp's lanes have parted");
    }
    all[lane] = other.brought;
    if (warp * 32 + lane != state.running) state.ready.push_back(warp * 32 + lane);
  }
  state.warp_waiting[warp] = 0;
  if (counting) end_counted_warp(warp);
  act(all);
}

void order_warp() { ++Emulator::current().warp_epochs[Emulator::current().running / 32]; }

void read(Site site, int64_t byte, void* to, size_t size) {
  Emulator& state = Emulator::current();
  note_read(site, byte, size, static_cast<int16_t>(state.running));
  std::memcpy(to, &state.shared[byte], size);
}

void read_as_warp(Site site, int64_t byte, void* to, size_t size) {
  Emulator& state = Emulator::current();
  note_read(site, byte, size, kWholeWarp);
  std::memcpy(to, &state.shared[byte], size);
}

void write(Site site, int64_t byte, const void* from, size_t size) {
  Emulator& state = Emulator::current();
  note_write(site, byte, size, false);
  std::memcpy(&state.shared[byte], from, size);
}

void copy_later(Site site, int64_t byte, const void* from, size_t size) {
  note_write(site, byte, size, true);
  self().copies.back().push_back({byte, from, size});
}

void close_copies() { self().copies.emplace_back(); }

// Copies as late as a GPU may. A change of the source before then changes the result.
void finish_copies(size_t groups_left) {
  Emulator& state = Emulator::current();
  auto& copies = self().copies;
  while (copies.size() - 1 > groups_left) {
    for (const Copy& copy : copies.front()) {
      if (copy.from) {
        std::memcpy(&state.shared[copy.byte], copy.from, copy.size);
      } else {
        std::memset(&state.shared[copy.byte], 0, copy.size);
      }
      const int warp = state.running / 32;
      each_cell({}, copy.byte, copy.size, [&](Cell& cell) {
        cell.in_flight = false;
        cell.write_block_epoch = state.block_epoch;
        cell.write_warp_epoch = state.warp_epochs[warp];
      });
    }
    copies.erase(copies.begin());
  }
}

void run(const void* kernel, int64_t blocks, int threads, int shared_bytes,
         const std::function<void()>& body) {
  Emulator& state = Emulator::current();
  if (threads % 32 || threads < 32 || threads > 1024)
    throw std::invalid_argument("threads come in warps of 32");
  if (shared_bytes > kMostSharedBytes)
    throw std::invalid_argument("more shared memory than a block of sm_90 has");
  state.threads = threads;
  if (state.fibers.size() < size_t(threads)) state.fibers.resize(threads);
  state.shared.resize(shared_bytes);
  state.cells.resize((shared_bytes + 1) / 2);
  state.body = &body;
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t last = blocks - 1; last > 0; --last)
    std::swap(order[last], order[draw_below(last + 1)]);
  begin_counted_launch(kernel, blocks, threads, shared_bytes);
  for (const int64_t block : order) {
    state.block = block;
    run_block();
    end_counted_block(block);
  }
  end_counted_launch();
}

void set_seed(uint64_t seed) { Emulator::current().random = seed; }

}  // namespace bclip::cuda::emulator
