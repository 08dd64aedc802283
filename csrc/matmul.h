// The three matrix products of a linear layer y = x W^T + b in bfloat16, summed in single
// precision:
//
//   y = x W^T + b (T, N)     from x (T, K), W (N, K), b (N)
//   dx = dy W (T, K)         from dy (T, N)
//   dW = dy^T x (N, K), db = sum_t dy_t
//
// Each is result (rows, columns) = left (rows, depth) right (depth, columns), where the operands
// may be stored transposed. Matrices are contiguous. Each element has a fixed order of summation,
// so the number of threads changes no bit of the result. Throws std::invalid_argument if a size is
// negative or the processor has no AMX.
#pragma once

#include <cstdint>

namespace bclip::cpu {

struct LinearProduct {
  int64_t rows, columns, depth;
  const uint16_t* left;  // (rows, depth) bfloat16; (depth, rows) if left_transposed
  bool left_transposed;
  // (depth, columns), or (columns, depth) if right_transposed. bfloat16, or float if
  // right_in_single.
  const void* right;
  bool right_transposed, right_in_single;
  const float* bias;  // (columns,), added to each row; or null
  void* result;       // written; bfloat16, or float if result_in_single
  bool result_in_single;
  // (rows,) or null. Written: the sums over the depth of a transposed left operand.
  float* left_sums;
  uint16_t* workspace;  // linear_workspace() elements for the right operand, aligned to 64 bytes
};

int64_t linear_workspace(int64_t columns, int64_t depth);

void linear(const LinearProduct& product, int threads);

}  // namespace bclip::cpu
