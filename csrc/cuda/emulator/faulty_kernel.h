// A small matrix product with a selectable fault, for the tests of the emulator.
#pragma once

namespace bclip::cuda::emulator {

enum class Fault {
  kNone,
  kNoBarrier,      // fragments are loaded without a barrier after the block's copies
  kNoWait,         // fragments are loaded while copies are in flight
  kNoWarpBarrier,  // a lane reads an element that its neighbour writes
  kOverwrite,      // a write to a matrix that other threads may still read
  kUnwritten,      // a read of shared memory that nobody wrote
  kSharedBounds,
  kGlobalBounds,    // a read after the end of A, which AddressSanitizer detects
  kLayout,          // two registers of a fragment are exchanged, which the result shows
  kDivergence,      // lanes of a warp shuffle at two places in the source
  kMissingThreads,  // a warp ends before the barrier
};

// c (16, 16) = a (16, 16) b (16, 16)^T, from float16 to float32. Matrices are contiguous, at
// multiples of 16 bytes.
void run_faulty_kernel(Fault fault, const void* a, const void* b, float* c);

}  // namespace bclip::cuda::emulator
