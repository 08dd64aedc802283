// A machine for blocks of threads: each thread a fiber, warps of 32 that meet, shared memory that knows who touched it.
//
// It is stricter than a GPU. An error (std::runtime_error that says where) is
//  - an access to shared memory that another thread's access isn't ordered with: not by a barrier of the block, nor by
//    one of the warp they share (__syncthreads and __syncwarp are the only barriers, so counting them is exact);
//    ldmatrix counts as a reader of its own, so that a warp needs a barrier even for what its own lanes wrote;
//  - shared memory read before it is written, or out of its bounds;
//  - any access to what a copy_async is still to write, and a thread that ends without waiting for its copies;
//  - lanes of a warp that meet at different places of the source, threads that end while others wait.
// Which ready thread runs next, and which block, is drawn from the seed. Blocks run one after another, so a race in
// global memory between blocks isn't seen, nor what the GPU's caches would do. Numbers err as a GPU's do, or by as much:
// matrices are multiplied with a tensor core's cut-off sums, exponentials and logarithms are off by their last places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace bclip::cuda::host {

constexpr int MOST_SHARED_BYTES = 227 * 1024;  // of a block of sm_90

struct Site {
  const char* file;
  int line;
};

// Of the running thread.
int thread();
int64_t block();

void meet_block(Site site);
// Once all lanes are here, the last one calls act with what each lane brought, in the order of lanes.
void meet_warp(Site site, const char* name, void* brought, void (*act)(void* const (&all)[32]));
void order_warp();  // within act: what lanes did before is ordered before what they do after

void read(Site site, int64_t byte, void* to, size_t size);
void write(Site site, int64_t byte, const void* from, size_t size);
// On behalf of the whole warp.
void read_as_warp(Site site, int64_t byte, void* to, size_t size);
void copy_later(Site site, int64_t byte, const void* from, size_t size);  // zeros where from is null
void close_copies();  // the group that is open
void finish_copies(size_t groups_left);

void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& body);

void set_seed(uint64_t seed);

}  // namespace bclip::cuda::host
