// A kernel with faults to choose from: what the host meaning must find, the tests plant here.
#include "csrc/cuda/emulator/faulty_kernel.h"

#include "csrc/cuda/device.cuh"

namespace bclip::cuda::host {
namespace {

constexpr int ROWS = 16, DEPTH = 16, COLUMNS = 16, WARPS = 2;

struct Arguments {
  const Half *a, *b;
  float* c;
  Fault fault;
};

// C (16, 16) = A (16, 16) B^T (16, 16); each of the two warps computes 8 columns.
__global__ void matmul(Arguments arguments) {
  const Fault fault = arguments.fault;
  const Shared<Half> a{0}, b{ROWS * DEPTH * 2}, scratch{2 * ROWS * DEPTH * 2};
  const int index = thread_index() * 8;
  const int past = fault == Fault::GLOBAL_BOUNDS ? ROWS * DEPTH - 128 : 0;
  if (index < ROWS * DEPTH) {
    copy_async(a, index, arguments.a + index + past, true);
  } else {
    copy_async(b, index - ROWS * DEPTH, arguments.b + index - ROWS * DEPTH, true);
  }
  commit_copies();
  if (fault != Fault::NO_WAIT) wait_for_copies<0>();
  if (fault != Fault::NO_BARRIER) block_barrier();

  uint32_t left[4], right[4];
  float sum[4] = {};
  const int lane = lane_index(), row = lane % 16, half = lane / 16;
  load_matrices(left, a, row * DEPTH + half * 8);
  load_matrices(right, b, (lane % 8 + lane / 16 * 8) * DEPTH + lane / 8 % 2 * 8);
  if (fault == Fault::LAYOUT) {
    const uint32_t other = left[1];
    left[1] = left[2];
    left[2] = other;
  }
  const int warp = warp_index();
  multiply<Half>(sum, left, right[2 * warp], right[2 * warp + 1]);
  if (fault == Fault::DIVERGENCE) {
    if (lane < 16) {
      sum[0] = shuffle_xor(sum[0], 0);
    } else {
      sum[0] = shuffle_xor(sum[0], 0);
    }
  }
  if (fault == Fault::OVERWRITE) a.store(thread_index(), Half{0});
  if (fault == Fault::SHARED_BOUNDS) scratch.store(thread_index() + 16, Half{0});
  if (fault == Fault::UNWRITTEN) sum[0] += static_cast<float>(scratch.load(lane).bits);
  if (fault == Fault::NO_WARP_BARRIER) {
    scratch.store(thread_index(), Half{0});
    sum[0] += static_cast<float>(scratch.load(thread_index() ^ 1).bits);
  }
  if (fault == Fault::MISSING_THREADS && warp == 0) return;
  block_barrier();
  for (int i = 0; i < 4; ++i) {
    arguments.c[(lane / 4 + i / 2 * 8) * COLUMNS + warp * 8 + lane % 4 * 2 + i % 2] = sum[i];
  }
}

}  // namespace

void planted(Fault fault, const void* a, const void* b, float* c) {
  launch(matmul, {1, WARPS * 32, 2 * ROWS * DEPTH * 2 + 64 * 2, nullptr},
         Arguments{static_cast<const Half*>(a), static_cast<const Half*>(b), c, fault});
}

}  // namespace bclip::cuda::host
