// Which of the dot products X = L R^T of two sets of vectors exceed a bound of their row, and one of their column, when X
// is known up to an error that the bounds allow for:
//
//   X_ij > row_high_i counts for row i, X_ij < row_low_i does not, and what lies between is undecided; so for columns.
//
// The undecided pairs are for the caller to settle, by their dot products in double precision. L, R row-major, contiguous.
// Throws std::invalid_argument where a size is negative or AMX is missing.
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

// The undecided pairs, 4 (i columns + j) + 1 where row i is undecided + 2 where column j is, in no order. If there are
// more than `most` it gives up: more than `most` are returned, and the counts mean nothing. Products of bfloat16 are exact
// and are summed in single precision, numbers below 2^-126 being zero.
std::vector<int64_t> amx_screen(const Screen& screen, int64_t most, int threads);

// out_p = sum_k left[i, k] right[j, k] in double precision, for each of the pairs i columns + j.
void dot_products(const float* left, const float* right, int64_t columns, int64_t width, const int64_t* pairs,
                  int64_t count, double* out, int threads);

}  // namespace bclip::cpu
