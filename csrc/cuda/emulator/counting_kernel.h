// A kernel whose accesses the caller chooses, for the tests of the counters.
#pragma once

#include <cstdint>

namespace bclip::cuda::emulator {

enum class Pattern {
  kSharedLoad,
  kSharedStore,
  kGlobalLoad,
  kGlobalStore,
  kCopy,          // into contiguous chunks of 16 bytes of shared memory, zeros for lanes without a
                  // place
  kLoop,          // each lane loads words of global memory, as many as its place says, twice
  kRejoinedLoop,  // the same with rejoin_lanes() after each of the two loops
  kUnits,         // one product, one exponential of each lane with a place, and so on
};

constexpr int kCountingBytes = 4096;  // of shared memory

// Runs `blocks` blocks of 2 warps, of which the first follows `pattern`. Each lane accesses `size`
// bytes (1, 2, 4, 8 or 16) at `places[lane]`, a byte of the block's shared memory or of `memory`. A
// lane with a negative place is inactive. Block b leaves out lanes below b.
void run_counting_kernel(Pattern pattern, int size, const int32_t* places, unsigned char* memory,
                         int blocks);

}  // namespace bclip::cuda::emulator
