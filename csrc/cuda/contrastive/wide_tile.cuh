// What 256 threads do with the dot products of a tile of 128 x 256, whose products they hold as the
// matrix unit of sm_90 leaves them: each warp has 16 rows. The kernels of Hopper run this code
// after the main loop of CUTLASS. The emulator runs it after a main loop of its own.
#pragma once

#include "csrc/cuda/contrastive/arithmetic.cuh"
#include "csrc/cuda/contrastive/hopper.h"
#include "csrc/cuda/tile.cuh"

namespace bclip::cuda {

constexpr int kWideRows = kHopperRows, kWideColumns = kHopperColumns, kWideThreads = 256;
constexpr int kWideWarps = kWideThreads / 32;
// The first named barrier that CUTLASS leaves to us.
constexpr int kWideBarrier = 8;

// The tile with these numbers among the tiles of S. It may lie beyond the ends of S, because a
// cluster computes two tiles.
__device__ __forceinline__ TilePlace wide_place(const Features& features, int row, int column) {
  const int first_row = row * kWideRows, first_column = column * kWideColumns;
  return {first_row, first_column, min(kWideRows, features.rows - first_row),
          min(kWideColumns, features.columns - first_column)};
}
__device__ __forceinline__ int64_t wide_index(const Features& features, const TilePlace& tile) {
  const int columns = (features.columns + kWideColumns - 1) / kWideColumns;
  return int64_t(tile.row / kWideRows) * columns + tile.column / kWideColumns;
}

// The numbers of a thread: those of 2 rows, 8 apart, and of 2 neighbouring columns in each of 32
// blocks of 8 columns. `thread` counts from the first of the 256.
struct WideNumbers {
  static constexpr int kBlocks = kWideColumns / 8, kCount = 4 * kBlocks;
  float (&numbers)[kCount];
  int thread;

  __host__ __device__ static constexpr int index_of(int block, int half, int odd) {
    return 4 * block + 2 * half + odd;
  }
  __host__ __device__ static constexpr int row_of(int thread, int half) {
    return thread / 32 * 16 + half * 8 + thread % 32 / 4;
  }
  __host__ __device__ static constexpr int column_of(int thread, int block, int odd) {
    return block * 8 + thread % 4 * 2 + odd;
  }

  __device__ __forceinline__ int warp() const { return thread / 32; }
  __device__ __forceinline__ int row(int half) const { return row_of(thread, half); }
  __device__ __forceinline__ int column(int block, int odd) const {
    return column_of(thread, block, odd);
  }
  __device__ __forceinline__ float& at(int block, int half, int odd) const {
    return numbers[index_of(block, half, odd)];
  }
  // Calls visit(block, half, odd, row, column, number), with row and column relative to the tile.
  template <class Visit>
  __device__ __forceinline__ void each(Visit&& visit) const {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        visit(block, half, 0, row(half), column(block, 0), at(block, half, 0));
        rejoin_lanes();
        visit(block, half, 1, row(half), column(block, 1), at(block, half, 1));
        rejoin_lanes();
      }
    }
  }
};

__device__ __forceinline__ void wide_barrier() { named_barrier<kWideBarrier, kWideThreads>(); }

template <class Fold>
__device__ __forceinline__ float fold_warp(float value, Fold fold) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) value = fold(value, shuffle_xor(value, mask));
  return value;
}

// Folds 8 columns of each thread, those of 4 blocks, over the 8 lanes that hold them. Each lane
// sends half of what it has left, so 7 shuffles fold 32 columns. The lane gets the column with the
// index lane / 4 of its 8: `column_of_lane` among the 32.
template <class Fold>
__device__ __forceinline__ float fold_columns(float (&columns)[8], Fold fold) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane_index() & 4 * half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? columns[i + half] : columns[i];
      const float sent = upper ? columns[i] : columns[i + half];
      columns[i] = fold(kept, shuffle_xor(sent, 4 * half));
    }
  }
  return columns[0];
}
__device__ __forceinline__ int column_of_lane() {
  const int index = lane_index() / 4;
  return index / 2 * 8 + lane_index() % 4 * 2 + index % 2;
}

// Sums over the threads of the tile, of up to 3 values a thread. `memory` takes 8 floats for each.
// Thread 0 stores them. Another barrier must come before the memory is written again.
template <int kValues>
__device__ __forceinline__ void store_totals(const float (&values)[kValues], Shared<float> memory,
                                             float* to, int thread) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float sum = fold_warp(values[i], Add());
    if (lane_index() == 0) memory.store(i * kWideWarps + thread / 32, sum);
  }
  wide_barrier();
  if (thread == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      float sum = memory.load(i * kWideWarps);
#pragma unroll
      for (int warp = 1; warp < kWideWarps; ++warp) sum += memory.load(i * kWideWarps + warp);
      store_global(to + i, sum);
    }
  }
}

}  // namespace bclip::cuda
