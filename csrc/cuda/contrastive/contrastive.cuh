// Shared parts of the contrastive kernels. 4 warps compute a tile of 128 x 128 dot products, with
// 64 x 64 in the registers of each.
#pragma once

#include <stdexcept>

#include "csrc/cuda/contrastive/arithmetic.cuh"
#include "csrc/cuda/tile.cuh"

namespace bclip::cuda {

constexpr int kSide = kContrastiveTile, kDepth = 32, kStages = 3, kThreads = 128;
constexpr int kStageBytes = 2 * kSide * kDepth * 2, kPipelineBytes = kStages * kStageBytes;
static_assert(kPipelineBytes == kContrastiveSharedBytes);

__device__ __forceinline__ int tiles_of(int count) { return (count + kSide - 1) / kSide; }

// Blocks go through the tiles in bands of rows. The features of a band's rows take 4 MiB. They stay
// in L2, while the features of the columns stream through it once a band. An RTX 3090 has 6 MiB.
__host__ __device__ __forceinline__ TileIndex tile_of_block(int block, int row_tiles,
                                                            int column_tiles, int width) {
  constexpr int kBandBytes = 4 << 20, kLeast = 4;
  const int most = kBandBytes / (kSide * 2) / width, wanted = most < kLeast ? kLeast : most,
            height = wanted < row_tiles ? wanted : row_tiles, band = height * column_tiles;
  const int first = block / band * height,
            rows = row_tiles - first < height ? row_tiles - first : height;
  return {first + block % band % rows, block % band / rows};
}

__device__ __forceinline__ TilePlace place_of_block(const Features& features) {
  const TileIndex tile = tile_of_block(static_cast<int>(block_index()), tiles_of(features.rows),
                                       tiles_of(features.columns), features.width);
  const int row = tile.row * kSide, column = tile.column * kSide;
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

// The copies of a thread: 4 chunks of 16 bytes of each operand and stage, 32 rows apart.
template <class T>
struct TileCopies {
  static constexpr int kPasses = kSide / (kThreads / 4);
  uintptr_t image, text;  // address of this thread's columns in the first row
  uint32_t image_rows[kPasses], text_rows[kPasses];  // from there, in bytes
  int depth, width;
  int place;  // index in its half of a stage

  __device__ __forceinline__ TileCopies(const Features& features, const TilePlace& tile)
      : depth(thread_index() % 4 * 8), width(features.width) {
    const int row = thread_index() / 4;
    const auto address = [&](const void* from, int first) {
      return reinterpret_cast<uintptr_t>(static_cast<const T*>(from) + int64_t(first) * width +
                                         depth);
    };
    image = address(features.image, tile.row);
    text = address(features.text, tile.column);
    place = Tile<T, kDepth>::index(row, depth);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      // Rows after the end repeat the last one, so that addresses need no condition. The epilogues
      // leave these products out.
      image_rows[pass] = uint32_t(min(row + pass * 32, tile.rows - 1)) * (width * 2);
      text_rows[pass] = uint32_t(min(row + pass * 32, tile.columns - 1)) * (width * 2);
    }
  }
  // Copies the next stage, with zeros after the features' last column.
  __device__ __forceinline__ void copy(int stage_byte) {
    const bool valid = depth < width;
    // A copy that reads nothing gets the address of column 0.
    const int back = valid ? 0 : depth * 2;
    const Shared<T> rows{stage_byte}, columns{stage_byte + kStageBytes / 2};
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      // Rows that are 32 apart permute their chunks alike.
      const int index = place + pass * 32 * kDepth;
      copy_async(rows, index, reinterpret_cast<const T*>(image - back + image_rows[pass]), valid);
      copy_async(columns, index, reinterpret_cast<const T*>(text - back + text_rows[pass]), valid);
    }
    image += kDepth * 2;
    text += kDepth * 2;
    depth += kDepth;
  }
};

// The fragments of both operands for 16 columns of the features.
struct Fragments {
  uint32_t left[4][4], right[4][4];

  template <class T>
  __device__ __forceinline__ void load(Shared<T> rows, Shared<T> columns, int left_place,
                                       int right_place) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Rows that are 16 apart permute their chunks alike.
      load_matrices(right[i], columns, right_place + i * 16 * kDepth);
      load_matrices(left[i], rows, left_place + i * 16 * kDepth);
    }
  }
  template <class T>
  __device__ __forceinline__ void multiply_into(Products& products) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply<T>(products.sums[i][2 * j], left[i], right[j][0], right[j][1]);
        multiply<T>(products.sums[i][2 * j + 1], left[i], right[j][2], right[j][3]);
      }
    }
  }
};

// Computes I T^T of the tile. Rows and columns after the ends of the features hold the products of
// the last ones. When it returns, no thread uses the memory of the pipeline any more.
//
// A warp loads the fragments for the next 16 columns before it multiplies those of these 16, so
// that its products don't wait for shared memory. Copies are kStages - 1 stages ahead.
template <class T>
__device__ __forceinline__ void multiply_tile(Products& products, const Features& features,
                                              const TilePlace& tile) {
  static_assert(kDepth == 32);
  const int steps = (features.width + kDepth - 1) / kDepth;
  TileCopies<T> copies(features, tile);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) products.sums[i][j][k] = 0.0f;
    }
  }
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copies.copy(step * kStageBytes);
    commit_copies();
  }
  const int lane = lane_index();
  const int left_place = Tile<T, kDepth>::index(warp_index() / 2 * 64 + lane % 16, lane / 16 * 8);
  const int right_place =
      Tile<T, kDepth>::index(warp_index() % 2 * 64 + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  Fragments fragments[2];
  int from = 0, to = (kStages - 1) * kStageBytes;
  const auto next = [](int byte) {
    return byte == kPipelineBytes - kStageBytes ? 0 : byte + kStageBytes;
  };
  const auto load = [&](Fragments& into, int depth) {
    // The places of columns 16 to 31 differ in one bit from those of columns 0 to 15.
    into.load<T>({from}, {from + kStageBytes / 2}, left_place ^ depth, right_place ^ depth);
  };
  const auto arrive = [&] {
    wait_for_copies<kStages - 2>();
    block_barrier();
  };
  arrive();
  load(fragments[0], 0);
  int step = 0;
  for (; step < steps - (kStages - 1); ++step) {
    load(fragments[1], 16);
    // All threads loaded their fragments of this stage before the last barrier.
    copies.copy(to);
    commit_copies();
    to = next(to);
    fragments[0].multiply_into<T>(products);
    arrive();
    from = next(from);
    load(fragments[0], 0);
    fragments[1].multiply_into<T>(products);
  }
  for (; step < steps - 1; ++step) {
    load(fragments[1], 16);
    commit_copies();
    fragments[0].multiply_into<T>(products);
    arrive();
    from = next(from);
    load(fragments[0], 0);
    fragments[1].multiply_into<T>(products);
  }
  load(fragments[1], 16);
  fragments[0].multiply_into<T>(products);
  fragments[1].multiply_into<T>(products);
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
  // The offset of a row in its tile takes 32 bits.
  if (features.width > 1 << 23) throw std::invalid_argument("features have more than 2^23 columns");
  return int64_t((features.rows + kSide - 1) / kSide) * ((features.columns + kSide - 1) / kSide);
}

}  // namespace bclip::cuda
