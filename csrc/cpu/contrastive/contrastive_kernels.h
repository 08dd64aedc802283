// What contrastive.cpp runs on tiles of at most kTileColumns columns, compiled once per instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/contrastive.h"

namespace bclip::cpu {

constexpr int64_t kTileColumns = 512;  // its sums and factors stay in L1

struct Tile {
  float* dots;
  int64_t stride, rows, columns;
  int64_t first;  // column of row 0's positive, counted within the tile: negative or beyond it where outside
};

// What a row or a column contributes to G: 2^(x * factor - offset) * share, with a whole-numbered offset.
struct Shares {
  const float *offsets, *shares;
};

// The groups of a tile that starts there.
inline Groups groups_at(const Groups& groups, int64_t row, int64_t column) {
  if (!groups.rows) return {};
  if (!groups.row_shares) return {groups.rows + row, groups.columns + column, nullptr, nullptr};
  return {groups.rows + row, groups.columns + column, groups.row_shares + row, groups.column_shares + column};
}

struct GradientTile {
  double factor;
  bool one_offset;  // the offsets of all rows and columns are the same, so one exponential serves both
  Shares rows, columns;
  const float* positive_grad;  // (rows,)
  Groups groups;
};

// The shares of all rows and columns of a problem, with the positives' gradient left apart.
struct SoftmaxShares {
  SoftmaxShares(const Softmax& softmax, int64_t rows, int64_t columns);
  SoftmaxShares(const SoftmaxShares&) = delete;  // points into itself

  // What a tile that starts there needs.
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
      : scale(static_cast<float>(sigmoid.scale)), bias(static_cast<float>(sigmoid.bias)),
        weight(static_cast<float>(sigmoid.weight)), with_gradients(sigmoid.with_gradients),
        groups(groups_at(sigmoid.groups, row, column)) {}

  float scale, bias, weight;
  bool with_gradients;
  Groups groups;
};

struct SigmoidTileSums {
  double loss, gradient;
};

struct ContrastiveKernels {
  const char* name;
  // Writes rows (rows,); adds to columns (columns,).
  void (*exponential_sums)(const Tile&, double factor, float offset, float* rows, double* columns);
  void (*softmax_gradient)(const Tile&, const GradientTile&);
  SigmoidTileSums (*sigmoid_gradient)(const Tile&, const SigmoidTile&);
};

extern const ContrastiveKernels kPlainKernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BCLIP_X86_TARGETS 1
extern const ContrastiveKernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace bclip::cpu
