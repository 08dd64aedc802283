// The contrastive operators over a tile of S = scale I T^T (+ bias): the maths of csrc/contrastive.h and of
// bclip_fast/ops/contrastive/reference.py. The kernels compute 128 x 128 of it at a time. All addresses are the
// device's; features begin at multiples of 16 bytes. Throws std::runtime_error with CUDA's reason.
#pragma once

#include <cstdint>

namespace bclip::cuda {

constexpr int CONTRASTIVE_TILE = 128;
// Of a block: 4 stages of 32 columns of the features' tiles.
constexpr int CONTRASTIVE_SHARED_BYTES = 4 * 2 * CONTRASTIVE_TILE * 32 * 2;

struct Features {
  const void *image, *text;  // (b, D), (B, D), contiguous
  bool bfloat16;             // else float16
  int rows, columns, width;  // b, B, D: a multiple of 8
  int64_t first;             // column of row 0's positive; 2^40 where there are no positives
  const float* scale;        // ()
  void* stream;
};

// Log-sum-exps, the positives apart, of each tile's rows and of its columns.
struct PartialSums {
  float* rows;     // (ceil(B / 128), b), written
  float* columns;  // (ceil(b / 128), B), written
};

void contrastive_forward(const Features& features, const PartialSums& sums);

struct Groups {
  const int32_t *rows, *columns;            // ids (b,), (B,); null without groups
  const float *row_shares, *column_shares;  // (b,), (B,), of the softmax
};

struct GradientTile {
  void* grad;      // (b, stride) float16: scale * G / w, written up to the stride; null for a sigmoid's loss alone
  int64_t stride;  // at least B, a multiple of 8
  float scale;
  // A row for each 128 x 128, written: the sum of G / w * (I T^T); for the sigmoid also that of G / w, and loss / w.
  float* partials;
};

// exp(-R_i) = 2^-near * rest, for rows and columns; where near is infinite, so is R.
struct Normalizers {
  const float *rows_near, *rows_rest, *columns_near, *columns_rest;
  const float* positive_grad;  // (b,), of G / w; not looked at without positives
};

void contrastive_softmax(const Features& features, const Normalizers& normalizers, const Groups& groups,
                         const GradientTile& tile);

// `bias` () or null.
void contrastive_sigmoid(const Features& features, const float* bias, const Groups& groups, const GradientTile& tile);

}  // namespace bclip::cuda
