// The kernels for tiles of at most kTileColumns columns, compiled once per instruction set and
// called by contrastive.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/contrastive.h"
#include "csrc/cpu/simd/isa.h"

namespace bclip::cpu {

constexpr int64_t kTileColumns = 512;  // the sums and factors of a tile stay in L1

struct Tile {
  float* dots;
  int64_t stride, rows, columns;
  int64_t first;  // column of row 0's positive relative to the tile, possibly outside it
};

// The contribution of each row, or of each column, to G: 2^(x * factor - offset) * share, with a
// whole-numbered offset.
struct Shares {
  const float *offsets, *shares;
};

// The groups of the tile that starts at (row, column).
inline Groups groups_at(const Groups& groups, int64_t row, int64_t column) {
  if (!groups.rows) return {};
  if (!groups.row_shares) return {groups.rows + row, groups.columns + column, nullptr, nullptr};
  return {groups.rows + row, groups.columns + column, groups.row_shares + row,
          groups.column_shares + column};
}

struct GradientTile {
  double factor;
  bool one_offset;  // all rows and columns have the same offset, so one exponential serves both
  Shares rows, columns;
  const float* positive_grad;  // (rows,)
  Groups groups;
};

// The shares of all rows and columns of a block. The gradient of the positives is separate.
struct SoftmaxShares {
  SoftmaxShares(const Softmax& softmax, int64_t rows, int64_t columns);
  SoftmaxShares(const SoftmaxShares&) = delete;  // points into itself

  // The part for the tile that starts at (row, column).
  GradientTile tile(int64_t row, int64_t column) const;

 private:
  double factor;
  bool one_offset;
  Shares rows, columns;
  const float* positive_grad;
  Groups groups;
  std::vector<float> numbers;
};

struct SigmoidTile {
  explicit SigmoidTile(const Sigmoid& sigmoid, int64_t row = 0, int64_t column = 0)
      : scale(static_cast<float>(sigmoid.scale)),
        bias(static_cast<float>(sigmoid.bias)),
        weight(static_cast<float>(sigmoid.weight)),
        with_gradients(sigmoid.with_gradients),
        groups(groups_at(sigmoid.groups, row, column)) {}

  float scale, bias, weight;
  bool with_gradients;
  Groups groups;
};

struct SigmoidTileSums {
  double loss, gradient;
};

struct ContrastiveKernels {
  // Writes `rows` and adds to `columns`.
  void (*exponential_sums)(const Tile&, double factor, float offset, float* rows, double* columns);
  void (*softmax_gradient)(const Tile&, const GradientTile&);
  SigmoidTileSums (*sigmoid_gradient)(const Tile&, const SigmoidTile&);
};

BCLIP_DECLARE_KERNELS(ContrastiveKernels, kContrastive, contrastive_kernels)

}  // namespace bclip::cpu
