// An emulator of a block of CUDA threads on a CPU. Each thread is a fiber, 32 fibers form a warp,
// and shared memory records who accessed it. It runs on x86-64 only and serves only the tests: no
// wheel contains it.
//
// It is stricter than a GPU. It reports these errors, as std::runtime_error with the place in the
// source:
//  - an access to shared memory that isn't ordered with an access of another thread. Only a barrier
//    of the block, or of the warp that the two threads share, orders them. Counting these barriers
//    is exact, because a kernel has only barriers of the block and of a warp. A read by ldmatrix is
//    for the whole warp, so it needs a barrier even after writes of the same warp;
//  - a read of shared memory before it is written, and an access outside its bounds;
//  - an access to memory that a copy_async in flight will write, and a thread that ends without
//    waiting for its copies;
//  - lanes of a warp that meet at different places in the source, and threads that end while others
//    wait for them.
//
// The seed determines the order of threads and of blocks. Blocks run one after another, so the
// emulator detects no race in global memory between blocks, and it doesn't model the caches.
// Arithmetic errs like a GPU's: products of matrices truncate their sums as tensor cores do, and
// exponentials and logarithms are wrong in their last places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace bclip::cuda::emulator {

constexpr int kMostSharedBytes = 227 * 1024;  // the shared memory of a block of sm_90

// A place in the source of a kernel.
struct Site {
  const char* file;
  int line;
};

// The indices of the running thread and of its block, and the threads of a block.
int thread();
int64_t block();
int threads();

// Waits for all threads of the block.
void meet_block(Site site);
// Waits for all lanes of the warp. The last lane calls act() with the data of all lanes, in their
// order.
void meet_warp(Site site, const char* name, void* brought, void (*act)(void* const (&all)[32]));
void order_warp();  // called by act(): orders the lanes' earlier accesses before their later ones

// Accesses to shared memory from byte `byte` on.
void read(Site site, int64_t byte, void* to, size_t size);
void write(Site site, int64_t byte, const void* from, size_t size);
// A read on behalf of the whole warp.
void read_as_warp(Site site, int64_t byte, void* to, size_t size);
// Writes zeros if from is null.
void copy_later(Site site, int64_t byte, const void* from, size_t size);
void close_copies();  // ends the current group of copies
void finish_copies(size_t groups_left);

// Runs body() for each thread of each block. `kernel` is the address of the kernel's function.
void run(const void* kernel, int64_t blocks, int threads, int shared_bytes,
         const std::function<void()>& body);

// Seeds the order of threads and blocks, for this thread of the process.
void set_seed(uint64_t seed);

}  // namespace bclip::cuda::emulator
