#include "csrc/contrastive.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "csrc/cpu/contrastive/contrastive_kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd/isa.h"

namespace bclip::cpu {

namespace {

constexpr double kLog2E = 1.4426950408889634;

const ContrastiveKernels& kernels() { return contrastive_kernels(isa_in_use()); }

void check(const Block& block) {
  if (block.rows < 0 || block.columns < 0 || block.stride < block.columns)
    throw std::invalid_argument("contrastive: a block has negative sizes or rows that overlap");
}

int64_t num_tiles(const Block& block) { return (block.columns + kTileColumns - 1) / kTileColumns; }

Tile tile_at(const Block& block, int64_t index) {
  const int64_t start = index * kTileColumns;
  const int64_t columns = std::min(kTileColumns, block.columns - start);
  return {block.dots + start, block.stride, block.rows, columns, block.first - start};
}

}  // namespace

void exponential_sums(const Block& block, double factor, float offset, const Sums& sums,
                      int threads) {
  check(block);
  const int64_t tiles = num_tiles(block);
  std::vector<float> partial(tiles * block.rows);
  parallel(tiles, threads, [&](int64_t index) {
    float* rows = partial.data() + index * block.rows;
    kernels().exponential_sums(tile_at(block, index), factor, offset, rows,
                               sums.columns + index * kTileColumns);
  });
  for (int64_t row = 0; row < block.rows; ++row) {
    double total = 0;
    for (int64_t index = 0; index < tiles; ++index) total += partial[index * block.rows + row];
    sums.rows[row] = static_cast<float>(total);
  }
}

SoftmaxShares::SoftmaxShares(const Softmax& softmax, int64_t rows, int64_t columns)
    : factor(softmax.scale * kLog2E),
      positive_grad(softmax.positive_grad),
      groups(softmax.groups),
      numbers(2 * (rows + columns)) {
  double lowest = INFINITY, highest = -INFINITY;
  const auto widen = [&](const double* lse, int64_t count) {
    bool all = true;
    for (int64_t i = 0; i < count; ++i) {
      if (lse[i] == INFINITY) {
        all = false;
        continue;
      }
      lowest = std::min(lowest, lse[i]);
      highest = std::max(highest, lse[i]);
    }
    return all;
  };
  const bool all_rows = widen(softmax.rows_lse, rows),
             all_columns = widen(softmax.columns_lse, columns);
  // No logit exceeds the log-sum-exp of its row or of its column, unless neither has a loss. One
  // offset puts the highest at 2^60. If the lowest is within a factor 2^60 of it, no power
  // overflows. Powers that flush to zero are then below 2^-126 of a share, which is at most the
  // weight.
  one_offset = (all_rows || all_columns) && lowest <= highest && (highest - lowest) * kLog2E < 60;
  const double shared = std::rint(highest * kLog2E) - 60;
  const auto fill = [&](const double* lse, int64_t count, float* offsets, float* shares) {
    for (int64_t i = 0; i < count; ++i) {
      const bool counts = lse[i] != INFINITY;
      const double exact = lse[i] * kLog2E;
      // Without a loss, the offset makes every power 0, and the share is 0 too.
      const double offset = one_offset ? shared : counts ? std::rint(exact) : 1e30;
      offsets[i] = static_cast<float>(offset);
      shares[i] = counts ? static_cast<float>(softmax.weight * std::exp2(offset - exact)) : 0.f;
    }
  };
  fill(softmax.rows_lse, rows, numbers.data(), numbers.data() + rows);
  fill(softmax.columns_lse, columns, numbers.data() + 2 * rows,
       numbers.data() + 2 * rows + columns);
  this->rows = {numbers.data(), numbers.data() + rows};
  this->columns = {numbers.data() + 2 * rows, numbers.data() + 2 * rows + columns};
}

void softmax_gradient(const Block& block, const Softmax& softmax, int threads) {
  check(block);
  const SoftmaxShares shares(softmax, block.rows, block.columns);
  parallel(num_tiles(block), threads, [&](int64_t index) {
    kernels().softmax_gradient(tile_at(block, index), shares.tile(0, index * kTileColumns));
  });
}

GradientTile SoftmaxShares::tile(int64_t row, int64_t column) const {
  return {factor,
          one_offset,
          {rows.offsets + row, rows.shares + row},
          {columns.offsets + column, columns.shares + column},
          positive_grad ? positive_grad + row : nullptr,
          groups_at(groups, row, column)};
}

SigmoidSums sigmoid_gradient(const Block& block, const Sigmoid& sigmoid, int threads) {
  check(block);
  std::vector<SigmoidTileSums> partial(num_tiles(block));
  parallel(num_tiles(block), threads, [&](int64_t index) {
    partial[index] = kernels().sigmoid_gradient(tile_at(block, index),
                                                SigmoidTile(sigmoid, 0, index * kTileColumns));
  });
  SigmoidSums total = {};
  for (const auto& part : partial) {
    total.loss += part.loss;
    total.gradient += part.gradient;
  }
  return total;
}

}  // namespace bclip::cpu
