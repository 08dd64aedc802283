// The operations of a transformer layer between its matrix products, on rows of D values. Each
// reads and writes memory once.
//
//   add_norm: s = stream + keep * branch;
//             normed = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, row by row.
//   backward: g = grad + wide_grad, h = g * weight, x = (s - mean) / sqrt(var + eps):
//             ds = (h - mean(h) - x * mean(h * x)) / sqrt(var + eps) + sum_grad;
//             d branch = keep * ds;
//             d weight = sum over rows of g * x, d bias = sum over rows of g.
//   keep:     0 if word j % 4 of Philox (philox.h) at counter (j / 4, row, 0, 0) and key seed is
//             below `drop_below`, else `kept`. All ones if drop_below is 0.
//   gelu:     x * Phi(x); backward grad * (Phi(x) + x * phi(x)).
//
// Matrices are row-major and contiguous, and arithmetic is in float. Sums have a fixed order, so
// the number of threads changes no bit of the result. Throws std::invalid_argument if a size is
// negative.
#pragma once

#include <cstdint>

namespace bclip::cpu {

// float32 or bfloat16 values. `at` is null for an absent input or an output that the caller doesn't
// need.
struct Values {
  void* at;
  bool half;  // bfloat16
};

struct Dropout {
  uint64_t seed;
  uint32_t drop_below;
  float kept;
};

struct AddNorm {
  int64_t rows, columns;
  Values stream, branch;  // (T, D); without a branch, s is the stream
  Values weight, bias;    // (D,)
  Values total;           // s (T, D); null without a branch
  Values normed, wide;    // (T, D), the same values in two dtypes
  double eps;
  Dropout dropout;
};

struct AddNormGradient {
  int64_t rows, columns;
  // (T, D), the gradients of normed, wide and s. Any may be null.
  Values grad, wide_grad, total_grad;
  Values total, weight;             // s (T, D), (D,)
  Values stream_grad, branch_grad;  // (T, D), written; branch_grad may be null
  float *weight_grad, *bias_grad;   // (D,), written
  double eps;
  Dropout dropout;
};

void add_norm(const AddNorm& norm, int threads);
void add_norm_backward(const AddNormGradient& gradient, int threads);

// `count` values. All arguments have the same dtype.
void gelu(Values x, Values out, int64_t count, int threads);
void gelu_backward(Values grad, Values x, Values out, int64_t count, int threads);

}  // namespace bclip::cpu
