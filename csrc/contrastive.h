// The contrastive operators' inner loops over a block X = I T^T of dot products (rows b, columns B).
//
//   S_ij = scale * X_ij + bias; the positive of row i stands in column first + i, wherever that falls inside.
//   softmax: rows_i = sum_{j != first + i} 2^(factor X_ij - offset), columns_j likewise over i;
//            G_ij = weight (exp(S_ij - R_i) + exp(S_ij - Q_j)), at the positives G_ij = positive_grad_i.
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
  int64_t first;  // column of row 0's positive; beyond every column where there are no positives
};

struct Sums {
  float* rows;      // (b,), written
  double* columns;  // (B,), added to
  float* positive;  // (b,), the dot products of the positives, written where there is one
};

struct Softmax {
  double scale, bias;
  double weight;
  const float* rows_lse;       // R (b,)
  const float* columns_lse;    // Q (B,)
  const float* positive_grad;  // (b,)
};

struct Sigmoid {
  double scale, bias, weight;
  bool with_gradients;
};

// The instruction set in use: "avx512", "avx2" or "plain". The best that the processor has, or what BCLIP_CPU_ISA named
// when it was first asked for; std::invalid_argument if that can't be had. AMX is used beside AVX-512 alone.
std::string instruction_set();

// `offset` must be a whole number; the caller chooses it, and checks the sums for overflow and underflow.
void exponential_sums(const Block& block, double factor, float offset, const Sums& sums, int threads);

// Overwrites X with G; returns the sum of G.
double softmax_gradient(const Block& block, const Softmax& softmax, int threads);

// Returns {loss / weight, sum of G}; overwrites X with G if asked for gradients.
struct SigmoidSums {
  double loss, gradient;
};
SigmoidSums sigmoid_gradient(const Block& block, const Sigmoid& sigmoid, int threads);

// The same from bfloat16 features on the matrix unit of x86 (AMX), with X and G in tiles that never leave the caches.
//
// A matrix is packed in panels of 32 rows or columns. An operand from the left, (M, K), is
// [M / 32][K / 32][2][16 rows][32 k]; from the right, (K, N), [N / 32][K / 32][2][16 pairs of k][16 columns][2 k]. A
// result in single precision, (M, N), comes as [N / 32][M / 32][32 rows][32 columns]. All are padded with zeros; below,
// `padded` means rounded up to a multiple of 32.
struct AmxBlock {
  const uint16_t* image;        // (b, D) bfloat16, contiguous
  const uint16_t* text_across;  // packed from the right: T^T, (D, B)
  int64_t rows, columns, width;
  int64_t first;
};

struct AmxGradients {
  const uint16_t* text;   // packed from the right: T, (B, D)
  float* image_gradient;  // G T, (padded b, padded D) as a result: written
  float* text_gradient;   // I^T G, (padded D, padded B) as a result: added to
  uint16_t* workspace;    // 2 * padded b * padded B
};

// Whether processor and kernel allow it; asks Linux for the permission.
bool has_amx();

// Packs (rows, columns) bfloat16, contiguous, from the right, or its transpose.
void amx_pack(const uint16_t* matrix, int64_t rows, int64_t columns, bool transpose, uint16_t* packed, int threads);

void amx_exponential_sums(const AmxBlock& block, double factor, float offset, const Sums& sums, int threads);
double amx_softmax_gradient(const AmxBlock& block, const Softmax& softmax, const AmxGradients& gradients, int threads);
// `gradients` isn't looked at unless the sigmoid asks for gradients.
SigmoidSums amx_sigmoid_gradient(const AmxBlock& block, const Sigmoid& sigmoid, const AmxGradients& gradients,
                                 int threads);

}  // namespace bclip::cpu
