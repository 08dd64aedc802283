// The contrastive operators' inner loops over a block X = I T^T of dot products (rows b, columns B).
//
//   S_ij = scale * X_ij (+ bias); the positive of row i stands in column first + i, wherever that falls inside.
//   softmax: rows_i = sum_{j != first + i} 2^(factor X_ij - offset), columns_j likewise over i;
//            G_ij = weight (exp(S_ij - R_i) + exp(S_ij - Q_j)), at the positives G_ij = positive_grad_i.
//   groups:  with ids, all pairs of one id are positives: from the softmax's G_ij their shares a_i + b_j are taken, before
//            any rounding, and the sigmoid's y is 1. `first` must then say that there are no other positives.
//   sigmoid: loss = sum_ij softplus(-y_ij S_ij), G_ij = -weight y_ij sigmoid(-y_ij S_ij), y = 1 on positives, else -1.
//
// All matrices are row-major. `dots` has its rows `stride` floats apart, features are contiguous. Sums are taken in a
// fixed order, so results are the same bits whatever the number of threads. Throws std::invalid_argument where a size
// is negative or a capability is missing.
#pragma once

#include <cstdint>
#include <string>

namespace bclip::cpu {

struct Block {
  float* dots;
  int64_t stride, rows, columns;
  int64_t first;  // column of row 0's positive; 2^40 where there are no positives
};

struct Sums {
  float* rows;      // (b,), written
  double* columns;  // (B,), added to
};

struct Groups {
  const int32_t *rows, *columns;            // ids (b,), (B,); null without groups
  const float *row_shares, *column_shares;  // a (b,), b (B,) of the softmax; null for the sigmoid
};

struct Softmax {
  double scale, weight;
  const double* rows_lse;      // R (b,), infinite where a row has no loss
  const double* columns_lse;   // Q (B,), likewise
  const float* positive_grad;  // (b,); null where `first` says that there are no positives
  Groups groups;
};

struct Sigmoid {
  double scale, bias, weight;
  bool with_gradients;
  Groups groups;
};

// The instruction set in use: "avx512", "avx2" or "plain". The best that the processor has, or what BCLIP_CPU_ISA named
// when it was first asked for; std::invalid_argument if that can't be had. AMX is used beside AVX-512 alone.
std::string instruction_set();

// `offset` must be a whole number; the caller chooses it, and checks the sums for overflow and underflow.
void exponential_sums(const Block& block, double factor, float offset, const Sums& sums, int threads);

// Overwrites X with G.
void softmax_gradient(const Block& block, const Softmax& softmax, int threads);

// Returns {loss / weight, sum of G}; overwrites X with G if asked for gradients.
struct SigmoidSums {
  double loss, gradient;
  double product;  // sum of G X, where it is computed
};
SigmoidSums sigmoid_gradient(const Block& block, const Sigmoid& sigmoid, int threads);

// The same from bfloat16 features, whole, on the matrix unit of x86 (AMX): X and G never leave a core's caches.
struct AmxProblem {
  const uint16_t *image, *text;  // (b, D), (B, D) bfloat16, contiguous
  int64_t rows, columns, width;
  int64_t first;
};

struct AmxGradients {
  void *image, *text;  // scale G T (b, D) and scale G^T I (B, D), bfloat16 unless in_single, written
  bool in_single;
  double scale;
};

// Whether processor and kernel allow it; asks Linux for the permission.
bool has_amx();

void amx_exponential_sums(const AmxProblem& problem, double factor, float offset, const Sums& sums, int threads);

// Returns the sum of G X.
double amx_softmax_gradient(const AmxProblem& problem, const Softmax& softmax, const AmxGradients& gradients,
                            int threads);
// `gradients` isn't written unless the sigmoid asks for gradients.
SigmoidSums amx_sigmoid_gradient(const AmxProblem& problem, const Sigmoid& sigmoid, const AmxGradients& gradients,
                                 int threads);

}  // namespace bclip::cpu
