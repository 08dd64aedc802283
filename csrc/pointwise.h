// What a transformer layer does between its matmuls, on rows of D values, a pass over memory each.
//
//   add_norm: s = stream + keep * branch;  normed = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, rowwise.
//   backward: g = grad + wide_grad, h = g * weight, x = (s - mean) / sqrt(var + eps):
//             ds = (h - mean(h) - x * mean(h * x)) / sqrt(var + eps) + sum_grad;  d branch = keep * ds;
//             d weight = sum over rows of g * x, d bias of g.
//   keep:     0 where word j % 4 of Philox4x32-10 at counter (j / 4, row, 0, 0) and key seed is below `drop_below`,
//             else `kept`; all ones where drop_below is 0.
//   gelu:     x * Phi(x); backward grad * (Phi(x) + x * phi(x)).
//
// Matrices are row-major and contiguous, computed in float. Sums are taken in a fixed order, so results are the same
// bits whatever the number of threads. Throws std::invalid_argument where a size is negative.
#pragma once

#include <cstdint>

namespace bclip::cpu {

// float32 or bfloat16; at is null where the value isn't there or isn't wanted.
struct Values {
  void* at;
  bool half;
};

struct Dropout {
  uint64_t seed;
  uint32_t drop_below;
  float kept;
};

struct AddNorm {
  int64_t rows, columns;
  Values stream, branch;   // (T, D); no branch: s is the stream
  Values weight, bias;     // (D,)
  Values total;            // s (T, D); null without a branch
  Values normed, wide;     // (T, D), the same in two dtypes
  double eps;
  Dropout dropout;
};

struct AddNormGradient {
  int64_t rows, columns;
  Values grad, wide_grad, total_grad;  // (T, D), of normed, wide and s; any may be null
  Values total, weight;                // s (T, D), (D,)
  Values stream_grad, branch_grad;     // (T, D), written; branch_grad may be null
  float *weight_grad, *bias_grad;      // (D,), written
  double eps;
  Dropout dropout;
};

void add_norm(const AddNorm& norm, int threads);
void add_norm_backward(const AddNormGradient& gradient, int threads);

// `count` values; out and x of one dtype, grad too.
void gelu(Values x, Values out, int64_t count, int threads);
void gelu_backward(Values grad, Values x, Values out, int64_t count, int threads);

}  // namespace bclip::cpu
