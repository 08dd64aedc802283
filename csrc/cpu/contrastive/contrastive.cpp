#include "csrc/contrastive.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/cpu/contrastive/contrastive_kernels.h"
#include "csrc/cpu/parallel.h"

namespace bclip::cpu {

namespace {

constexpr double kLog2E = 1.4426950408889634;

// What this processor can run, best first.
std::vector<const ContrastiveKernels*> supported() {
  std::vector<const ContrastiveKernels*> found;
#ifdef BCLIP_X86_TARGETS
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back(&kAvx512Kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kPlainKernels);
  return found;
}

const ContrastiveKernels& chosen() {
  const auto found = supported();
  const char* asked = std::getenv("BCLIP_CPU_ISA");
  if (!asked || !*asked) return *found.front();
  std::string names;
  for (const auto* kernels : found) {
    if (asked == std::string(kernels->name)) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("BCLIP_CPU_ISA is '" + std::string(asked) + "'; this processor and build have " + names);
}

const ContrastiveKernels& kernels() {
  static const ContrastiveKernels& once = chosen();
  return once;
}

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

std::string instruction_set() { return kernels().name; }

void exponential_sums(const Block& block, double factor, float offset, const Sums& sums, int threads) {
  check(block);
  const int64_t tiles = num_tiles(block);
  std::vector<float> partial(tiles * block.rows);
  parallel(tiles, threads, [&](int64_t index) {
    float* rows = partial.data() + index * block.rows;
    kernels().exponential_sums(tile_at(block, index), factor, offset, rows, sums.columns + index * kTileColumns);
  });
  for (int64_t row = 0; row < block.rows; ++row) {
    double total = 0;
    for (int64_t index = 0; index < tiles; ++index) total += partial[index * block.rows + row];
    sums.rows[row] = static_cast<float>(total);
  }
}

SoftmaxShares::SoftmaxShares(const Softmax& softmax, int64_t rows, int64_t columns)
    : factor(softmax.scale * kLog2E), positive_grad(softmax.positive_grad), groups(softmax.groups),
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
  const bool all_rows = widen(softmax.rows_lse, rows), all_columns = widen(softmax.columns_lse, columns);
  // No logit exceeds its row's nor its column's log-sum-exp. With the highest at 2^60 and the lowest within 60 of it,
  // neither power overflows, and what is flushed to zero is below 2^-126 of a share that is at most the weight.
  // Only where neither has a loss may a logit be higher.
  one_offset = (all_rows || all_columns) && lowest <= highest && (highest - lowest) * kLog2E < 60;
  const double shared = std::rint(highest * kLog2E) - 60;
  const auto fill = [&](const double* lse, int64_t count, float* offsets, float* shares) {
    for (int64_t i = 0; i < count; ++i) {
      const bool counts = lse[i] != INFINITY;
      const double exact = lse[i] * kLog2E;
      // Where there is no loss the offset is one from which any power is 0, as its share.
      const double offset = one_offset ? shared : counts ? std::rint(exact) : 1e30;
      offsets[i] = static_cast<float>(offset);
      shares[i] = counts ? static_cast<float>(softmax.weight * std::exp2(offset - exact)) : 0.f;
    }
  };
  fill(softmax.rows_lse, rows, numbers.data(), numbers.data() + rows);
  fill(softmax.columns_lse, columns, numbers.data() + 2 * rows, numbers.data() + 2 * rows + columns);
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
  return {factor, one_offset, {rows.offsets + row, rows.shares + row},
          {columns.offsets + column, columns.shares + column}, positive_grad ? positive_grad + row : nullptr,
          groups_at(groups, row, column)};
}

SigmoidSums sigmoid_gradient(const Block& block, const Sigmoid& sigmoid, int threads) {
  check(block);
  std::vector<SigmoidTileSums> partial(num_tiles(block));
  parallel(num_tiles(block), threads, [&](int64_t index) {
    partial[index] = kernels().sigmoid_gradient(tile_at(block, index), SigmoidTile(sigmoid, 0, index * kTileColumns));
  });
  SigmoidSums total = {};
  for (const auto& part : partial) {
    total.loss += part.loss;
    total.gradient += part.gradient;
  }
  return total;
}

}  // namespace bclip::cpu
