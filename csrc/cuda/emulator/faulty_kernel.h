// A small matmul with a fault to choose, for the tests of the host meaning.
#pragma once

namespace bclip::cuda::host {

enum class Fault {
  NONE,
  NO_BARRIER,       // fragments are loaded before the block's copies are known to be there
  NO_WAIT,          // ... while they are under way
  NO_WARP_BARRIER,  // a lane reads what its neighbour writes
  OVERWRITE,        // a matrix that others may still read
  UNWRITTEN,        // shared memory is read as it came
  SHARED_BOUNDS,
  GLOBAL_BOUNDS,    // a half of A is read past its end: AddressSanitizer's to find
  LAYOUT,           // two registers of a fragment are exchanged: the result's to show
  DIVERGENCE,       // a warp's lanes shuffle at two places
  MISSING_THREADS,  // a warp ends without coming to the barrier
};

// c (16, 16) = a (16, 16) b (16, 16)^T, float16 to float32; addresses of contiguous memory, multiples of 16.
void planted(Fault fault, const void* a, const void* b, float* c);

}  // namespace bclip::cuda::host
