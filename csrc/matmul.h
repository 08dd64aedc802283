// The three matrix products of a linear layer y = x W^T + b in bfloat16, summed in single precision:
//
//   y = x W^T + b (T, N)     from x (T, K), W (N, K), b (N)
//   dx = dy W (T, K)         from dy (T, N)
//   dW = dy^T x (N, K), db = sum_t dy_t
//
// All are result (rows, columns) = left (rows, depth) right (depth, columns), with operands that may lie transposed.
// Matrices are contiguous. Each number is summed in one order, whatever the number of threads. Throws
// std::invalid_argument where a size is negative or the processor has no AMX.
#pragma once

#include <cstdint>

namespace bclip::cpu {

struct Product {
  int64_t rows, columns, depth;
  const uint16_t* left;  // (rows, depth) bfloat16; (depth, rows) if left_transposed
  bool left_transposed;
  const void* right;  // (depth, columns); (columns, depth) if right_transposed; bfloat16, or float if right_in_single
  bool right_transposed, right_in_single;
  const float* bias;  // (columns), added to each row, or null
  void* result;       // bfloat16, or float if result_in_single; written
  bool result_in_single;
  float* left_sums;    // (rows): sums of the transposed left operand over its depth, written, or null
  uint16_t* workspace;  // product_workspace numbers, for the right operand, 64-byte aligned
};

int64_t product_workspace(int64_t columns, int64_t depth);

void amx_product(const Product& product, int threads);

}  // namespace bclip::cpu
