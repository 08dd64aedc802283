// Matrices in shared memory, read as fragments.
#pragma once

#include "csrc/cuda/device.cuh"

namespace bclip::cuda {

// Rows of COLUMNS elements of 2 bytes. Chunks of 16 bytes are exchanged within a row so that 8 rows' same chunk, which
// is what ldmatrix reads, lies in 8 different groups of banks; where a row isn't a power of two, padding does that.
template <class T, int COLUMNS>
struct Tile {
  static constexpr bool POWER = (COLUMNS & (COLUMNS - 1)) == 0;
  static constexpr int STRIDE = POWER ? COLUMNS : COLUMNS + 8;
  static_assert(COLUMNS % 32 == 0 && (POWER || STRIDE / 8 % 2 == 1));
  Shared<T> memory;

  __host__ __device__ static constexpr int bytes(int rows) { return rows * STRIDE * 2; }

  // Of a chunk's first element; `column` is a multiple of 8.
  __device__ __forceinline__ static int index(int row, int column) {
    const int chunk = column / 8;
    const int place = !POWER ? chunk : COLUMNS == 32 ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7);
    return row * STRIDE + place * 8;
  }
  __device__ __forceinline__ static int index_of_pair(int row, int column) {
    return index(row, column & ~7) + (column & 7);
  }

  // Fragments of the 16 x 16 block at (row, column), said of the product they go into: the left operand as it stands or
  // transposed; the right operand, two fragments of 8 columns, whose columns lie in rows here, or whose rows do.
  __device__ __forceinline__ void load_left(uint32_t (&to)[4], int row, int column) const {
    const int lane = lane_index();
    load_matrices(to, memory, index(row + lane % 16, column + lane / 16 * 8));
  }
  __device__ __forceinline__ void load_left_transposed(uint32_t (&to)[4], int row, int column) const {
    const int lane = lane_index();
    load_matrices_transposed(to, memory, index(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  }
  __device__ __forceinline__ void load_right_columns(uint32_t (&to)[4], int row, int column) const {
    const int lane = lane_index();
    load_matrices(to, memory, index(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  }
  __device__ __forceinline__ void load_right_rows(uint32_t (&to)[4], int row, int column) const {
    const int lane = lane_index();
    load_matrices_transposed(to, memory, index(row + lane % 16, column + lane / 16 * 8));
  }

  // Rows [0, rows) from global memory, `threads` of which this is number `thread`; zeros from row `length` on.
  __device__ __forceinline__ void copy_rows(const T* from, int64_t stride, int rows, int length, int thread,
                                            int threads) const {
    for (int chunk = thread; chunk < rows * (COLUMNS / 8); chunk += threads) {
      const int row = chunk / (COLUMNS / 8), column = chunk % (COLUMNS / 8) * 8;
      const bool wanted = row < length;
      copy_async(memory, index(row, column), wanted ? from + row * stride + column : from, wanted);
    }
  }
  // Rows [0, length) to global memory.
  __device__ __forceinline__ void store_rows(T* to, int64_t stride, int length, int thread, int threads) const {
    for (int chunk = thread; chunk < length * (COLUMNS / 8); chunk += threads) {
      const int row = chunk / (COLUMNS / 8), column = chunk % (COLUMNS / 8) * 8;
      *reinterpret_cast<Quad*>(to + row * stride + column) = memory.template load_as<Quad>(index(row, column));
    }
  }
};

// A fragment of the left operand, rounded from two fragments of sums that lie side by side.
template <class T>
__device__ __forceinline__ void pack_left(uint32_t (&to)[4], const float (&first)[4], const float (&second)[4]) {
  to[0] = pack<T>(first[0], first[1]);
  to[1] = pack<T>(first[2], first[3]);
  to[2] = pack<T>(second[0], second[1]);
  to[3] = pack<T>(second[2], second[3]);
}

}  // namespace bclip::cuda
