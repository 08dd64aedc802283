// Counts the dot products X = L R^T of two sets of vectors that exceed a bound of their row, or of
// their column. Each bound is an interval, because X is known only approximately:
//
//   X_ij > row_high_i counts for row i, X_ij < row_low_i doesn't, and a value between them is
//   undecided. The same rule holds for columns.
//
// The caller decides the undecided pairs by their dot products in double precision. L and R are
// row-major and contiguous. Throws std::invalid_argument if a size is negative or the processor has
// no AMX.
#pragma once

#include <cstdint>
#include <vector>

namespace bclip::cpu {

struct Screen {
  const uint16_t *left, *right;  // (rows, width), (columns, width) bfloat16
  int64_t rows, columns, width;
  const float *row_low, *row_high, *column_low, *column_high;
  int64_t *row_counts, *column_counts;  // (rows,), (columns,), added to
};

// Returns the undecided pairs in any order, as 4 (i columns + j), plus 1 if row i is undecided,
// plus 2 if column j is. With more than `most` such pairs it gives up, returns more than `most`,
// and leaves meaningless counts. Products of bfloat16 are exact. Their sums are in single
// precision, where numbers below 2^-126 become zero.
std::vector<int64_t> amx_screen(const Screen& screen, int64_t most, int threads);

// out[p] = sum_k left[i, k] right[j, k] in double precision, where pairs[p] = i columns + j.
void dot_products(const float* left, const float* right, int64_t columns, int64_t width,
                  const int64_t* pairs, int64_t count, double* out, int threads);

}  // namespace bclip::cpu
