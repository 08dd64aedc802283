// The contrastive operators over S = scale I T^T (+ bias), as csrc/contrastive.h defines them. A
// block of threads computes a tile of 128 x 128. All addresses are the device's, and features are
// aligned to 16 bytes. Throws std::runtime_error with CUDA's reason.
#pragma once

#include <cstdint>

namespace bclip::cuda {

constexpr int kContrastiveTile = 128;
// Shared memory of a block: 3 stages of 32 columns of both tiles of features. Two blocks then fit
// on every multiprocessor from sm_80 on, also on those of 100 KiB.
constexpr int kContrastiveSharedBytes = 3 * 2 * kContrastiveTile * 32 * 2;

// The place of a tile among the tiles of a matrix.
struct TileIndex {
  int row, column;
};

// The tile of block number `block`, for features of `width` columns.
TileIndex contrastive_tile(int block, int row_tiles, int column_tiles, int width);

struct Features {
  const void *image, *text;  // (b, D), (B, D), contiguous
  bool bfloat16;             // else float16
  int rows, columns, width;  // b, B, D: a multiple of 8
  int64_t first;             // column of row 0's positive, or 2^40 without positives
  const float* scale;        // ()
  void* stream;
};

// Log-sum-exps of the rows and of the columns of each tile, without the positives.
struct PartialSums {
  float* rows;     // (ceil(B / 128), b), written
  float* columns;  // (ceil(b / 128), B), written
};

void contrastive_forward(const Features& features, const PartialSums& sums);

struct Groups {
  const int32_t *rows, *columns;            // ids (b,), (B,); null without groups
  const float *row_shares, *column_shares;  // (b,), (B,) for the softmax
};

struct GradientTile {
  // (b, stride) float16: scale * G / w, written up to the stride. Null if the caller needs only the
  // sigmoid's loss.
  void* grad;
  int64_t stride;          // at least B, a multiple of 8
  float scale, per_scale;  // a power of two, and its inverse
  // Written, one row for each tile: the sum of G / w * (I T^T). The sigmoid adds the sum of G / w,
  // and loss / w.
  float* partials;
};

// exp(-R_i) = 2^-near * rest, for rows and columns. An infinite `near` means an infinite R.
struct Normalizers {
  const float *rows_near, *rows_rest, *columns_near, *columns_rest;
  const float* positive_grad;  // (b,): G / w at the positives; unused without positives
};

void contrastive_softmax(const Features& features, const Normalizers& normalizers,
                         const Groups& groups, const GradientTile& tile);

// `bias` () or null.
void contrastive_sigmoid(const Features& features, const float* bias, const Groups& groups,
                         const GradientTile& tile);

}  // namespace bclip::cuda
