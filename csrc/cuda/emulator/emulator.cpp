#include "csrc/cuda/emulator/emulator.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif
#ifndef __x86_64__
#error "The host meaning of the CUDA kernels, for tests alone, switches stacks on x86-64."
#endif

// void bclip_switch(void** from, void* to): keeps what the System V ABI says a callee keeps.
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

namespace bclip::cuda::host {
namespace {

constexpr size_t STACK_BYTES = 256 * 1024;
constexpr int NOBODY = -1, SEVERAL = -2, WHOLE_WARP = -3;

struct Copy {
  int64_t byte;
  const void* from;
  size_t size;
};

struct Fiber {
  std::unique_ptr<char[]> memory = std::make_unique<char[]>(STACK_BYTES);
  void* stack = nullptr;
  void* fake_stack = nullptr;
  bool ended = false;
  Site site{};
  const char* name = "";
  void* brought = nullptr;
  std::vector<std::vector<Copy>> copies;  // the last group is open
};

// The last write and the last reads of two bytes. Of reads in one epoch of the block, it is enough to know the warp, or
// that there were several; within a warp the thread, or that there were several since its last barrier.
struct Cell {
  int writer, write_warp;
  uint32_t write_block_epoch, write_warp_epoch;
  int reader, read_warp;
  uint32_t read_block_epoch, read_warp_epoch;
  bool in_flight;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  int running = 0, threads = 0, block_waiting = 0;
  int64_t block = 0;
  std::vector<int> warp_waiting;
  std::vector<uint32_t> warp_epochs;
  uint32_t block_epoch = 0;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  void *stack = nullptr, *fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
  uint64_t random = 1;
};

Machine machine;

uint64_t draw() {  // Steele, Lea and Flood 2014, SplitMix64
  uint64_t z = (machine.random += 0x9e3779b97f4a7c15);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

Fiber& self() { return machine.fibers[machine.running]; }

std::string at(Site site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

[[noreturn]] void fail(Site site, const std::string& what) {
  throw std::runtime_error(at(site) + ": block " + std::to_string(machine.block) + ", thread " +
                           std::to_string(machine.running) + ": " + what);
}

void leave() {
  Fiber& fiber = self();
  __sanitizer_start_switch_fiber(&fiber.fake_stack, machine.bottom, machine.bytes);
  bclip_switch(&fiber.stack, machine.stack);
  __sanitizer_finish_switch_fiber(self().fake_stack, &machine.bottom, &machine.bytes);
}

void start() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.bottom, &machine.bytes);
  try {
    (*machine.body)();
    for (const auto& group : self().copies) {
      if (!group.empty()) throw std::runtime_error("a thread ended without waiting for its copies");
    }
  } catch (...) {
    machine.error = std::current_exception();
  }
  self().ended = true;
  leave();
  std::abort();
}

void prepare(Fiber& fiber) {
  const auto top = (reinterpret_cast<uintptr_t>(fiber.memory.get()) + STACK_BYTES) & ~uintptr_t(15);
  void** slot = reinterpret_cast<void**>(top) - 2;
  *slot = reinterpret_cast<void*>(&start);
  fiber.stack = slot - 6;
  fiber.ended = false;
  fiber.copies.assign(1, {});
}

void enter(int thread) {
  machine.running = thread;
  Fiber& fiber = self();
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.memory.get(), STACK_BYTES);
  bclip_switch(&machine.stack, fiber.stack);
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
}

std::string describe_waiting() {
  std::string result;
  for (int thread = 0; thread < machine.threads; ++thread) {
    const Fiber& fiber = machine.fibers[thread];
    if (fiber.ended) continue;
    result += result.empty() ? "" : ", ";
    result += "thread " + std::to_string(thread) + " at " + fiber.name + " in " + at(fiber.site);
    if (result.size() > 300) return result + " ...";
  }
  return result;
}

void run_block() {
  std::fill(machine.shared.begin(), machine.shared.end(), 0xff);  // NaN in every floating type
  std::fill(machine.cells.begin(), machine.cells.end(), Cell{NOBODY, 0, 0, 0, NOBODY, 0, 0, 0, false});
  machine.block_waiting = 0;
  machine.block_epoch = 1;
  machine.warp_waiting.assign(machine.threads / 32, 0);
  machine.warp_epochs.assign(machine.threads / 32, 1);
  machine.ready.resize(machine.threads);
  std::iota(machine.ready.begin(), machine.ready.end(), 0);
  for (int thread = 0; thread < machine.threads; ++thread) prepare(machine.fibers[thread]);
  while (!machine.ready.empty()) {
    std::swap(machine.ready[draw() % machine.ready.size()], machine.ready.back());
    const int next = machine.ready.back();
    machine.ready.pop_back();
    enter(next);
    if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
  }
  const std::string waiting = describe_waiting();
  if (!waiting.empty()) {
    throw std::runtime_error("block " + std::to_string(machine.block) +
                             ": threads wait for others that ended or wait elsewhere: " + waiting);
  }
}

template <class Visit>
void each_cell(Site site, int64_t byte, size_t size, Visit&& visit) {
  if (byte < 0 || byte + int64_t(size) > int64_t(machine.shared.size())) {
    fail(site, "byte " + std::to_string(byte) + " is outside the " + std::to_string(machine.shared.size()) +
                   " bytes of shared memory");
  }
  if (byte % int64_t(size)) fail(site, "byte " + std::to_string(byte) + " isn't a multiple of the access's size");
  for (int64_t cell = byte / 2; cell < (byte + int64_t(size) + 1) / 2; ++cell) visit(machine.cells[cell]);
}

void check_write_before(Site site, const Cell& cell, int thread, bool reading) {
  const std::string verb = reading ? "reads" : "writes";
  if (cell.in_flight) fail(site, verb + " what a copy is still to write: wait_for_copies is missing");
  if (cell.writer == NOBODY) {
    if (reading) fail(site, "reads shared memory that nobody wrote");
    return;
  }
  const int warp = machine.running / 32;
  const bool ordered = cell.writer == thread || cell.write_block_epoch != machine.block_epoch ||
                       (cell.write_warp == warp && cell.write_warp_epoch != machine.warp_epochs[warp]);
  if (!ordered) fail(site, verb + " what thread " + std::to_string(cell.writer) + " wrote: a barrier is missing");
}

void check_reads_before(Site site, const Cell& cell, int thread) {
  if (cell.reader == NOBODY || cell.read_block_epoch != machine.block_epoch) return;
  const int warp = machine.running / 32;
  const bool ordered = cell.read_warp == warp &&
                       (cell.read_warp_epoch != machine.warp_epochs[warp] || cell.reader == thread);
  if (!ordered) fail(site, "overwrites what others may still read: a barrier is missing");
}

void note_read(Site site, int64_t byte, size_t size, int thread) {
  const int warp = machine.running / 32;
  const uint32_t warp_epoch = machine.warp_epochs[warp];
  each_cell(site, byte, size, [&](Cell& cell) {
    check_write_before(site, cell, thread, true);
    const bool first = cell.reader == NOBODY || cell.read_block_epoch != machine.block_epoch;
    if (first || (cell.read_warp == warp && cell.read_warp_epoch != warp_epoch)) {
      cell.reader = thread;
    } else if (cell.reader != thread) {
      cell.reader = SEVERAL;
    }
    cell.read_warp = first || cell.read_warp == warp ? warp : SEVERAL;
    cell.read_block_epoch = machine.block_epoch;
    cell.read_warp_epoch = warp_epoch;
  });
}

void note_write(Site site, int64_t byte, size_t size, bool in_flight) {
  const int warp = machine.running / 32;
  each_cell(site, byte, size, [&](Cell& cell) {
    check_write_before(site, cell, machine.running, false);
    check_reads_before(site, cell, machine.running);
    cell = {machine.running, warp, machine.block_epoch, machine.warp_epochs[warp], NOBODY, 0, 0, 0, in_flight};
  });
}

}  // namespace

int thread() { return machine.running; }
int64_t block() { return machine.block; }

void meet_block(Site site) {
  Fiber& fiber = self();
  fiber.site = site;
  fiber.name = "block_barrier";
  if (++machine.block_waiting < machine.threads) return leave();
  for (int other = 0; other < machine.threads; ++other) {
    const Site there = machine.fibers[other].site;
    if (there.line != site.line || std::strcmp(there.file, site.file)) {
      fail(site, "thread " + std::to_string(other) + " meets this barrier at " + at(there));
    }
    if (other != machine.running) machine.ready.push_back(other);
  }
  machine.block_waiting = 0;
  ++machine.block_epoch;
}

void meet_warp(Site site, const char* name, void* brought, void (*act)(void* const (&all)[32])) {
  const int warp = machine.running / 32;
  Fiber& fiber = self();
  fiber.site = site;
  fiber.name = name;
  fiber.brought = brought;
  if (++machine.warp_waiting[warp] < 32) return leave();
  void* all[32];
  for (int lane = 0; lane < 32; ++lane) {
    const Fiber& other = machine.fibers[warp * 32 + lane];
    if (other.site.line != site.line || std::strcmp(other.site.file, site.file) || std::strcmp(other.name, name)) {
      fail(site, std::string(name) + " meets lane " + std::to_string(lane) + " at " + other.name + " in " +
                     at(other.site) + ": the warp's lanes have parted");
    }
    all[lane] = other.brought;
    if (warp * 32 + lane != machine.running) machine.ready.push_back(warp * 32 + lane);
  }
  machine.warp_waiting[warp] = 0;
  act(all);
}

void order_warp() { ++machine.warp_epochs[machine.running / 32]; }

void read(Site site, int64_t byte, void* to, size_t size) {
  note_read(site, byte, size, machine.running);
  std::memcpy(to, &machine.shared[byte], size);
}

void read_as_warp(Site site, int64_t byte, void* to, size_t size) {
  note_read(site, byte, size, WHOLE_WARP);
  std::memcpy(to, &machine.shared[byte], size);
}

void write(Site site, int64_t byte, const void* from, size_t size) {
  note_write(site, byte, size, false);
  std::memcpy(&machine.shared[byte], from, size);
}

void copy_later(Site site, int64_t byte, const void* from, size_t size) {
  note_write(site, byte, size, true);
  self().copies.back().push_back({byte, from, size});
}

void close_copies() { self().copies.emplace_back(); }

// As late as the GPU may do it: a source that changed meanwhile shows.
void finish_copies(size_t groups_left) {
  auto& copies = self().copies;
  while (copies.size() - 1 > groups_left) {
    for (const Copy& copy : copies.front()) {
      if (copy.from) {
        std::memcpy(&machine.shared[copy.byte], copy.from, copy.size);
      } else {
        std::memset(&machine.shared[copy.byte], 0, copy.size);
      }
      const int warp = machine.running / 32;
      each_cell({}, copy.byte, copy.size, [&](Cell& cell) {
        cell.in_flight = false;
        cell.write_block_epoch = machine.block_epoch;
        cell.write_warp_epoch = machine.warp_epochs[warp];
      });
    }
    copies.erase(copies.begin());
  }
}

void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& body) {
  if (threads % 32 || threads < 32 || threads > 1024) throw std::invalid_argument("threads come in warps of 32");
  if (shared_bytes > MOST_SHARED_BYTES) throw std::invalid_argument("more shared memory than a block of sm_90 has");
  machine.threads = threads;
  if (machine.fibers.size() < size_t(threads)) machine.fibers.resize(threads);
  machine.shared.resize(shared_bytes);
  machine.cells.resize((shared_bytes + 1) / 2);
  machine.body = &body;
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t last = blocks - 1; last > 0; --last) std::swap(order[last], order[draw() % (last + 1)]);
  for (const int64_t block : order) {
    machine.block = block;
    run_block();
  }
}

void set_seed(uint64_t seed) { machine.random = seed; }

}  // namespace bclip::cuda::host
