// Shared parts of the contrastive kernels. 4 warps compute a tile of 128 x 128 dot products, with
// 64 x 64 in the registers of each.
#pragma once

#include "csrc/cuda/contrastive/arithmetic.cuh"
#include "csrc/cuda/tile.cuh"

namespace bclip::cuda {

constexpr int kSide = kContrastiveTile, kDepth = 32, kStages = 4, kThreads = 128;
constexpr int kStageBytes = 2 * kSide * kDepth * 2, kPipelineBytes = kStages * kStageBytes;
static_assert(kPipelineBytes == kContrastiveSharedBytes);

__device__ __forceinline__ int tiles_of(int count) { return (count + kSide - 1) / kSide; }

// Blocks go through the tiles in bands of 8 rows of tiles, so that concurrent blocks share operands
// in L2.
__device__ __forceinline__ TilePlace place_of_block(const Features& features) {
  const int64_t row_tiles = tiles_of(features.rows), band = 8 * int64_t(tiles_of(features.columns));
  const int64_t first = block_index() / band * 8,
                height = row_tiles - first < 8 ? row_tiles - first : 8;
  const int row = static_cast<int>(first + block_index() % band % height) * kSide;
  const int column = static_cast<int>(block_index() % band / height) * kSide;
  return {row, column, min(kSide, features.rows - row), min(kSide, features.columns - column)};
}

// The dot products of a thread: its fragments of sums for 4 blocks of 16 rows and 8 blocks of 8
// columns.
struct Products {
  float sums[4][8][4];

  // The row, and the column, of an element of a fragment, relative to the tile.
  __device__ __forceinline__ static int row_of(int block, int half) {
    return warp_index() / 2 * 64 + block * 16 + half * 8 + lane_index() / 4;
  }
  __device__ __forceinline__ static int column_of(int block) {
    return warp_index() % 2 * 64 + block * 8 + lane_index() % 4 * 2;
  }

  // Calls visit(index of the row, index of the column, row, column, number), with row and column
  // relative to the tile.
  template <class Visit>
  __device__ __forceinline__ void each(Visit&& visit) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          visit(2 * i + half, 2 * j, row_of(i, half), column_of(j), sums[i][j][2 * half]);
          rejoin_lanes();
          visit(2 * i + half, 2 * j + 1, row_of(i, half), column_of(j) + 1,
                sums[i][j][2 * half + 1]);
          rejoin_lanes();
        }
      }
    }
  }
};

// Computes I T^T of the tile, with zeros after the ends of the features. When it returns, no thread
// uses the memory of the pipeline any more.
template <class T>
__device__ __forceinline__ void multiply_tile(Products& products, const Features& features,
                                              const TilePlace& tile) {
  const int width = features.width, steps = (width + kDepth - 1) / kDepth;
  const T* const image = static_cast<const T*>(features.image) + int64_t(tile.row) * width;
  const T* const text = static_cast<const T*>(features.text) + int64_t(tile.column) * width;
  const auto part = [](int stage, int side) {
    return Tile<T, kDepth>{{stage * kStageBytes + side * (kStageBytes / 2)}};
  };
  const auto copy = [&](int step) {
    if (step < steps) {
      const Tile<T, kDepth> rows = part(step % kStages, 0), columns = part(step % kStages, 1);
      const int row = thread_index() / 4, column = thread_index() % 4 * 8,
                depth = step * kDepth + column;
#pragma unroll
      for (int pass = 0; pass < kSide; pass += kThreads / 4) {
        const bool in_image = row + pass < tile.rows && depth < width;
        const bool in_text = row + pass < tile.columns && depth < width;
        copy_async(rows.memory, rows.index(row + pass, column),
                   in_image ? image + int64_t(row + pass) * width + depth : image, in_image);
        copy_async(columns.memory, columns.index(row + pass, column),
                   in_text ? text + int64_t(row + pass) * width + depth : text, in_text);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) products.sums[i][j][k] = 0.0f;
    }
  }
  const int first_row = warp_index() / 2 * 64, first_column = warp_index() % 2 * 64;
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    block_barrier();
    // All threads finished with this stage before the barrier.
    copy(step + kStages - 1);
    const Tile<T, kDepth> rows = part(step % kStages, 0), columns = part(step % kStages, 1);
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[4][4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rows.load_left(left[i], first_row + i * 16, k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        columns.load_right_columns(right, first_column + j * 16, k);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          multiply<T>(products.sums[i][2 * j], left[i], right[0], right[1]);
          multiply<T>(products.sums[i][2 * j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }
  wait_for_copies<0>();
  block_barrier();
}

// Folds the 8 rows, or the 16 columns, of each thread over all threads that hold a part of them.
// The results go to `memory` (2 x 128 floats). After a block barrier, folded() reads them.
template <class Fold>
__device__ __forceinline__ void fold_rows(float (&rows)[8], Shared<float> memory, Fold fold) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    rows[i] = fold(rows[i], shuffle_xor(rows[i], 1));
    rows[i] = fold(rows[i], shuffle_xor(rows[i], 2));
    if (lane_index() % 4 == 0)
      memory.store(warp_index() % 2 * kSide + Products::row_of(i / 2, i % 2), rows[i]);
  }
}
template <class Fold>
__device__ __forceinline__ void fold_columns(float (&columns)[16], Shared<float> memory,
                                             Fold fold) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2)
      columns[j] = fold(columns[j], shuffle_xor(columns[j], mask));
    if (lane_index() < 4)
      memory.store(warp_index() / 2 * kSide + Products::column_of(j / 2) + j % 2, columns[j]);
  }
}
template <class Fold>
__device__ __forceinline__ float folded(Shared<float> memory, int index, Fold fold) {
  return fold(memory.load(index), memory.load(kSide + index));
}

// The values of the rows, and of the columns, of each thread.
__device__ __forceinline__ void row_values(float (&to)[8], Shared<float> memory) {
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = memory.load(Products::row_of(i / 2, i % 2));
}
__device__ __forceinline__ void column_values(float (&to)[16], Shared<float> memory) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Pair pair = memory.load_as<Pair>(Products::column_of(j));
    to[2 * j] = pair.low;
    to[2 * j + 1] = pair.high;
  }
}

// Folds a value over the block, and returns the result in each thread. `memory` takes 4 floats, and
// is free again after another barrier.
template <class Fold>
__device__ __forceinline__ float fold_block(float value, Shared<float> memory, Fold fold) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) value = fold(value, shuffle_xor(value, mask));
  if (lane_index() == 0) memory.store(warp_index(), value);
  block_barrier();
  return fold(fold(memory.load(0), memory.load(1)), fold(memory.load(2), memory.load(3)));
}

// As those of arithmetic.cuh, for our tiles.
__device__ __forceinline__ int positives_of(const Features& features, const TilePlace& tile) {
  return positives_of(features, tile, kSide, kSide);
}
__device__ __forceinline__ bool is_plain(const TilePlace& tile, int shift) {
  return is_plain(tile, shift, kSide, kSide);
}

inline int64_t blocks_of(const Features& features) {
  return int64_t((features.rows + kSide - 1) / kSide) * ((features.columns + kSide - 1) / kSide);
}

}  // namespace bclip::cuda
