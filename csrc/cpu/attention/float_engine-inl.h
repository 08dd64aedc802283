// The engine of attention-inl.h that multiplies in single precision, for operands in float and in
// bfloat16.
#pragma once

#include "csrc/cpu/attention/blocks-inl.h"
#include "csrc/cpu/simd/bf16.h"
#include "csrc/cpu/simd/transpose.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

// A block is its 32 rows of 32 floats.
struct FloatEngine {
  using Element = float;

  struct Session {};

  static constexpr bool kTrims = true;  // products skip the padding

  static void load_rows(const float* from, int64_t stride, int64_t rows, int64_t columns,
                        float* block) {
    load_rows_as(from, stride, rows, columns, block);
  }
  static void load_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns,
                        float* block) {
    load_rows_as(from, stride, rows, columns, block);
  }

  static void right(const float* block, float* to) { std::memcpy(to, block, kBlock * sizeof *to); }

  static void left_of_transpose(const float* block, float* to) {
    for (int64_t i = 0; i < kPanel; i += kLanes)
      for (int64_t j = 0; j < kPanel; j += kLanes)
        transpose(block + i * kPanel + j, kPanel, to + j * kPanel + i, kPanel);
  }

  static void right_of_transpose(const float* block, float* to) { left_of_transpose(block, to); }

  // Write one row of a left block, and two rows of a right one.
  BCLIP_INLINE void left_row(float* block, int64_t row, const Lanes numbers[2]) {
    Store(block + row * kPanel, numbers[0]);
    Store(block + row * kPanel + kLanes, numbers[1]);
  }
  BCLIP_INLINE void right_rows(float* block, int64_t row, const Lanes numbers[2][2]) {
    left_row(block, row, numbers[0]);
    left_row(block, row + 1, numbers[1]);
  }

  // result (rows, columns), with rows `stride` floats apart, = or += left (rows, depth) right
  // (depth, columns). Columns up to the next multiple of 16 come from the padding.
  static void multiply(const float* left, const float* right, const Extent& extent, float* result,
                       int64_t stride, bool add) {
#if defined(BCLIP_AVX512)
    constexpr int kRows = 8;
#elif defined(BCLIP_NEON)
    constexpr int kRows = 3;
#else
    constexpr int kRows = kRegisterBytes == 32 ? 2 : 1;  // 8 sums in the 16 registers
#endif
    if (extent.columns > kLanes)
      multiply_rows<kRows, 2>(left, right, extent, result, stride, add);
    else
      multiply_rows<2 * kRows, 1>(left, right, extent, result, stride, add);
  }

 private:
  template <int kRows, int kColumns>
  static void multiply_rows(const float* left, const float* right, const Extent& extent,
                            float* result, int64_t stride, bool add) {
    const int64_t whole = extent.rows / kRows * kRows;
    for (int64_t row = 0; row < whole; row += kRows)
      product<kRows, kColumns>(left + row * kPanel, right, extent.depth, result + row * stride,
                               stride, add);
    for (int64_t row = whole; row < extent.rows; ++row)
      product<1, kColumns>(left + row * kPanel, right, extent.depth, result + row * stride, stride,
                           add);
  }

  template <int kRows, int kColumns>
  BCLIP_INLINE void product(const float* left, const float* right, int64_t depth, float* result,
                            int64_t stride, bool add) {
    Lanes sums[kRows][kColumns];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) sums[i][j] = Lanes{};
    for (; depth > 0; depth -= kPanel, left += kBlock, right += kBlock) {
      const int64_t count = std::min(depth, kPanel);
      for (int64_t k = 0; k < count; ++k) {
        Lanes columns[kColumns];
#pragma GCC unroll 2
        for (int j = 0; j < kColumns; ++j) columns[j] = Load(right + k * kPanel + j * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
          for (int j = 0; j < kColumns; ++j) sums[i][j] += columns[j] * left[i * kPanel + k];
      }
    }
    // The previous sum is added last. A sum that started from it would round each term at the size
    // of the total.
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) {
        float* const place = result + i * stride + j * kLanes;
        Store(place, add ? Load(place) + sums[i][j] : sums[i][j]);
      }
  }

  template <class Stored>
  static void load_rows_as(const Stored* from, int64_t stride, int64_t rows, int64_t columns,
                           float* block) {
    for (int64_t row = 0; row < kPanel; ++row)
      for (int64_t column = 0; column < kPanel; column += kLanes)
        Store(block + row * kPanel + column,
              row < rows && column < columns ? Load(from + row * stride + column) : Lanes{});
  }
};

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
