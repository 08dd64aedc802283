// Matrices in shared memory that are read as fragments.
#pragma once

#include "csrc/cuda/device.cuh"

namespace bclip::cuda {

// Rows of kColumns elements of 2 bytes. ldmatrix reads the same chunk of 16 bytes from 8 rows, and
// copies take 8 chunks one after another. Chunks are permuted within a row, so that these 8 are in
// different groups of banks: a wave of 128 bytes is one access.
template <class T, int kColumns>
struct Tile {
  // A row of an odd number of half waves starts at the first or the second half of a wave in turn.
  static constexpr bool kOdd = kColumns % 64 != 0;
  static constexpr int kStride = kColumns;
  static_assert(kColumns % 32 == 0);
  Shared<T> memory;

  __host__ __device__ static constexpr int bytes(int rows) { return rows * kStride * 2; }

  // The index of the first element of a chunk, where `column` is a multiple of 8.
  __device__ __forceinline__ static int index(int row, int column) {
    const int chunk = column / 8;
    const int place = kOdd ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7);
    return row * kStride + place * 8;
  }
  __device__ __forceinline__ static int index_of_pair(int row, int column) {
    return index(row, column & ~7) + (column & 7);
  }

  // Fragments of the 16 x 16 block at (row, column). The left operand is read as stored or
  // transposed. The right operand has two fragments of 8 columns, whose columns or rows are rows in
  // memory.
  __device__ __forceinline__ void load_left(uint32_t (&to)[4], int row, int column) const {
    const int lane = lane_index();
    load_matrices(to, memory, index(row + lane % 16, column + lane / 16 * 8));
  }
  __device__ __forceinline__ void load_left_transposed(uint32_t (&to)[4], int row,
                                                       int column) const {
    const int lane = lane_index();
    load_matrices_transposed(to, memory,
                             index(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  }
  __device__ __forceinline__ void load_right_columns(uint32_t (&to)[4], int row, int column) const {
    const int lane = lane_index();
    load_matrices(to, memory, index(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  }
  __device__ __forceinline__ void load_right_rows(uint32_t (&to)[4], int row, int column) const {
    const int lane = lane_index();
    load_matrices_transposed(to, memory, index(row + lane % 16, column + lane / 16 * 8));
  }

  // The index of the element `columns` after that at `from`, in the same row. `columns` is a
  // multiple of 16 that shares no bit with the column of `from`. An offset that is known at compile
  // time costs at most one instruction, also for many rows.
  __device__ __forceinline__ static int after(int from, int columns) {
    constexpr int kPermuted = kOdd ? 32 : 64;
    return (from ^ columns % kPermuted) + columns / kPermuted * kPermuted;
  }

  // Copies rows [0, rows) from global memory, with zeros from row `length` on. The caller is thread
  // number `thread` of the `threads` that share the work.
  __device__ __forceinline__ void copy_rows(const T* from, int64_t stride, int rows, int length,
                                            int thread, int threads) const {
    for (int chunk = thread; chunk < rows * (kColumns / 8); chunk += threads) {
      const int row = chunk / (kColumns / 8), column = chunk % (kColumns / 8) * 8;
      const bool valid = row < length;
      copy_async(memory, index(row, column), valid ? from + row * stride + column : from, valid);
    }
  }
  // The lanes that copy 128 bytes of a row, or 64 where rows are odd, and the chunks that each
  // copies in a row. The places of a lane's chunks in one row, and in rows that are 8 apart, differ
  // by constants. Rows that are 4 apart also differ in the third bit of their permutation.
  static constexpr int kLanes = kOdd ? 4 : 8, kParts = kColumns / (8 * kLanes);

  // The same in a loop of a few instructions. It keeps an address and a place in registers, so it
  // is for kernels that have some left. `threads` is a multiple of 32.
  __device__ __forceinline__ void copy_sequence(const T* from, int64_t stride, int rows, int length,
                                                int thread, int threads) const {
    const int height = threads / kLanes;
    int row = thread / kLanes, place = index(row, thread % kLanes * 8);
    const T* source = from + row * stride + thread % kLanes * 8;
    const auto advance = [&] {
      row += height;
      place = (height % 8 ? place ^ 32 : place) + height * kStride;
    };
#pragma unroll 1
    for (; row < min(rows, length); advance(), source += height * stride) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        copy_async(memory, place + part * kLanes * 8, source + part * kLanes * 8, true);
    }
    rejoin_lanes();
#pragma unroll 1
    for (; row < rows; advance()) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        memory.template store_as<Quad>(place + part * kLanes * 8, Quad{});
    }
    rejoin_lanes();
  }
  // Copies 16 rows with one warp. Rows from `length` on repeat the last one.
  __device__ __forceinline__ void copy_strip(const T* from, int64_t stride, int length) const {
    constexpr int kHeight = 32 / kLanes;
    const int row = lane_index() / kLanes, column = lane_index() % kLanes * 8;
    const int first = index(row, column);
#pragma unroll
    for (int pass = 0; pass < 16 / kHeight; ++pass) {
      const int place = (kHeight % 8 && pass % 2 ? first ^ 32 : first) + pass * kHeight * kStride;
      const T* const source = from + min(row + pass * kHeight, length - 1) * stride + column;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        copy_async(memory, place + part * kLanes * 8, source + part * kLanes * 8, true);
    }
  }
  // Stores rows [0, length) to global memory.
  __device__ __forceinline__ void store_rows(T* to, int64_t stride, int length, int thread,
                                             int threads) const {
    for (int chunk = thread; chunk < length * (kColumns / 8); chunk += threads) {
      const int row = chunk / (kColumns / 8), column = chunk % (kColumns / 8) * 8;
      store_global(reinterpret_cast<Quad*>(to + row * stride + column),
                   memory.template load_as<Quad>(index(row, column)));
    }
  }
};

// Rounds two neighbouring fragments of sums to a fragment of a left operand.
template <class T>
__device__ __forceinline__ void pack_left(uint32_t (&to)[4], const float (&first)[4],
                                          const float (&second)[4]) {
  to[0] = pack<T>(first[0], first[1]);
  to[1] = pack<T>(first[2], first[3]);
  to[2] = pack<T>(second[0], second[1]);
  to[3] = pack<T>(second[2], second[3]);
}

}  // namespace bclip::cuda
