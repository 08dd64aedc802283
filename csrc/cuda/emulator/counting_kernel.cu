// A kernel whose accesses the caller chooses, for the tests of the counters.
#include "csrc/cuda/emulator/counting_kernel.h"

#include "csrc/cuda/device.cuh"

namespace bclip::cuda::emulator {
namespace {

struct Arguments {
  Pattern pattern;
  const int32_t* places;
  unsigned char* memory;
};

template <class T>
__global__ void count(Arguments arguments) {
  const Pattern pattern = arguments.pattern;
  const Shared<T> shared{0};
  const Shared<Quad> chunks{0};
  const int lane = lane_index();
  for (int chunk = thread_index(); chunk < kCountingBytes / 16; chunk += 64) {
    chunks.store(chunk, Quad{});  // the kernel's preparation
  }
  block_barrier();
  if (warp_index() > 0) return;
  const int place = lane < block_index() ? -1 : arguments.places[lane];
  const int index = place / int(sizeof(T));
  T* const global = reinterpret_cast<T*>(arguments.memory + place);
  const bool active = place >= 0;
  if (pattern == Pattern::kSharedLoad && active) shared.load(index);
  if (pattern == Pattern::kSharedStore && active) shared.store(index, T{});
  if (pattern == Pattern::kGlobalLoad && active) load_global(global);
  if (pattern == Pattern::kGlobalStore && active) store_global(global, T{});
  if (pattern == Pattern::kCopy) {
    const Quad* const from = reinterpret_cast<const Quad*>(arguments.memory);
    copy_async(chunks, lane, active ? from + place / 16 : from, active);
    commit_copies();
    wait_for_copies<0>();
  }
  if (pattern == Pattern::kLoop || pattern == Pattern::kRejoinedLoop) {
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(arguments.memory);
    for (int turn = 0; turn < 2; ++turn) {
      for (int word = 0; word < place; ++word) load_global(words + word * 32 + lane);
      if (pattern == Pattern::kRejoinedLoop) rejoin_lanes();
    }
  }
  if (pattern == Pattern::kUnits) {
    if (active) exp2_fast(log2_fast(1.0f));
    uint32_t fragments[4];
    float sum[4] = {};
    load_matrices(fragments, chunks, place < 0 ? 0 : place / 16);
    multiply<Half>(sum, fragments, 0, 0);
    multiply<Half>(sum, fragments, 0, 0);
    shuffle_xor(sum[0], 1);
    warp_barrier();
  }
}

}  // namespace

void run_counting_kernel(Pattern pattern, int size, const int32_t* places, unsigned char* memory,
                         int blocks) {
  void (*const kernel)(Arguments) = size == 1   ? count<uint8_t>
                                    : size == 2 ? count<uint16_t>
                                    : size == 4 ? count<uint32_t>
                                    : size == 8 ? count<Pair>
                                                : count<Quad>;
  launch(kernel, {blocks, 64, kCountingBytes, nullptr}, Arguments{pattern, places, memory});
}

}  // namespace bclip::cuda::emulator
