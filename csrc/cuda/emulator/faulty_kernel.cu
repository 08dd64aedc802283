// A kernel with a selectable fault, which the emulator must detect.
#include "csrc/cuda/emulator/faulty_kernel.h"

#include "csrc/cuda/device.cuh"

namespace bclip::cuda::emulator {
namespace {

constexpr int kRows = 16, kDepth = 16, kColumns = 16, kWarps = 2;

struct Arguments {
  const Half *a, *b;
  float* c;
  Fault fault;
};

// C (16, 16) = A (16, 16) B^T (16, 16). Each of the two warps computes 8 columns.
__global__ void matmul(Arguments arguments) {
  const Fault fault = arguments.fault;
  const Shared<Half> a{0}, b{kRows * kDepth * 2}, scratch{2 * kRows * kDepth * 2};
  const int index = thread_index() * 8;
  const int past = fault == Fault::kGlobalBounds ? kRows * kDepth - 128 : 0;
  if (index < kRows * kDepth) {
    copy_async(a, index, arguments.a + index + past, true);
  } else {
    copy_async(b, index - kRows * kDepth, arguments.b + index - kRows * kDepth, true);
  }
  commit_copies();
  if (fault != Fault::kNoWait) wait_for_copies<0>();
  if (fault != Fault::kNoBarrier) block_barrier();

  uint32_t left[4], right[4];
  float sum[4] = {};
  const int lane = lane_index(), row = lane % 16, half = lane / 16;
  load_matrices(left, a, row * kDepth + half * 8);
  load_matrices(right, b, (lane % 8 + lane / 16 * 8) * kDepth + lane / 8 % 2 * 8);
  if (fault == Fault::kLayout) {
    const uint32_t other = left[1];
    left[1] = left[2];
    left[2] = other;
  }
  const int warp = warp_index();
  multiply<Half>(sum, left, right[2 * warp], right[2 * warp + 1]);
  if (fault == Fault::kDivergence) {
    if (lane < 16) {
      sum[0] = shuffle_xor(sum[0], 0);
    } else {
      sum[0] = shuffle_xor(sum[0], 0);
    }
  }
  if (fault == Fault::kOverwrite) a.store(thread_index(), Half{0});
  if (fault == Fault::kSharedBounds) scratch.store(thread_index() + 16, Half{0});
  if (fault == Fault::kUnwritten) sum[0] += static_cast<float>(scratch.load(lane).bits);
  if (fault == Fault::kNoWarpBarrier) {
    scratch.store(thread_index(), Half{0});
    sum[0] += static_cast<float>(scratch.load(thread_index() ^ 1).bits);
  }
  if (fault == Fault::kMissingThreads && warp == 0) return;
  block_barrier();
  for (int i = 0; i < 4; ++i) {
    arguments.c[(lane / 4 + i / 2 * 8) * kColumns + warp * 8 + lane % 4 * 2 + i % 2] = sum[i];
  }
}

}  // namespace

void run_faulty_kernel(Fault fault, const void* a, const void* b, float* c) {
  launch(matmul, {1, kWarps * 32, 2 * kRows * kDepth * 2 + 64 * 2, nullptr},
         Arguments{static_cast<const Half*>(a), static_cast<const Half*>(b), c, fault});
}

}  // namespace bclip::cuda::emulator
