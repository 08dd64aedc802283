// The inner loops of the contrastive operators, over a block X = I T^T of dot products (b rows, B
// columns).
//
//   S_ij = scale * X_ij (+ bias). The positive of row i is in column first + i, if that exists.
//   softmax: rows_i = sum_{j != first + i} 2^(factor X_ij - offset);
//            columns_j is the same sum over i;
//            G_ij = weight (exp(S_ij - R_i) + exp(S_ij - Q_j)), except that G_ij = positive_grad_i
//            at the positives.
//   groups:  all pairs with the same id are positives. The softmax subtracts their shares a_i + b_j
//            from G_ij before it rounds. The sigmoid takes y = 1 for them. There must be no other
//            positives, so `first` is 2^40.
//   sigmoid: loss = sum_ij softplus(-y_ij S_ij), G_ij = -weight y_ij sigmoid(-y_ij S_ij),
//            where y = 1 at positives, else -1.
//
// Matrices are row-major. Rows of `dots` are `stride` floats apart; features are contiguous. Sums
// have a fixed order, so the number of threads changes no bit of the result. Throws
// std::invalid_argument if a size is negative or the processor lacks a capability.
#pragma once

#include <cstdint>

namespace bclip::cpu {

struct Block {
  float* dots;
  int64_t stride, rows, columns;
  int64_t first;  // column of row 0's positive, or 2^40 without positives
};

struct Sums {
  float* rows;      // (b,), written
  double* columns;  // (B,), added to
};

struct Groups {
  const int32_t *rows, *columns;            // ids (b,), (B,); null without groups
  const float *row_shares, *column_shares;  // a (b,), b (B,) for the softmax, null for the sigmoid
};

struct Softmax {
  double scale, weight;
  const double* rows_lse;      // R (b,), infinite for a row without a loss
  const double* columns_lse;   // Q (B,), infinite for a column without a loss
  const float* positive_grad;  // (b,), or null if `first` excludes positives
  Groups groups;
};

struct Sigmoid {
  double scale, bias, weight;
  bool with_gradients;
  Groups groups;
};

// `offset` must be a whole number. The caller chooses it, and checks the sums for overflow and
// underflow.
void exponential_sums(const Block& block, double factor, float offset, const Sums& sums,
                      int threads);

// Overwrites X with G.
void softmax_gradient(const Block& block, const Softmax& softmax, int threads);

// Returns {loss / weight, sum of G}. Overwrites X with G if the caller asks for gradients.
struct SigmoidSums {
  double loss, gradient;
  double product;  // sum of G X, from the matrix unit only
};
SigmoidSums sigmoid_gradient(const Block& block, const Sigmoid& sigmoid, int threads);

// The same operators from all bfloat16 features at once, on the matrix unit of x86 (AMX): X and G
// never leave a core's caches. They need has_amx() of cpu/simd/isa.h.
struct AmxProblem {
  const uint16_t *image, *text;  // (b, D), (B, D) bfloat16, contiguous
  int64_t rows, columns, width;
  int64_t first;
};

struct AmxGradients {
  // Scale G T (b, D) and scale G^T I (B, D), written; bfloat16 unless in_single.
  void *image, *text;
  bool in_single;
  double scale;
};

void amx_exponential_sums(const AmxProblem& problem, double factor, float offset, const Sums& sums,
                          int threads);

// Returns the sum of G X.
double amx_softmax_gradient(const AmxProblem& problem, const Softmax& softmax,
                            const AmxGradients& gradients, int threads);
// Writes `gradients` only if the sigmoid asks for gradients.
SigmoidSums amx_sigmoid_gradient(const AmxProblem& problem, const Sigmoid& sigmoid,
                                 const AmxGradients& gradients, int threads);

}  // namespace bclip::cpu
