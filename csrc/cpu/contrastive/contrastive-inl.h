// The contrastive kernels.
#pragma once

#include "csrc/cpu/contrastive/contrastive_kernels.h"
#include "csrc/cpu/simd/math.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

constexpr int kRowsAtOnce = 4;

// Whether the positive of `row` is among the 16 columns from `column` on. Writes the positive's
// lane to `lane`.
BCLIP_INLINE bool holds_positive(const Tile& tile, int64_t row, int64_t column, int64_t& lane) {
  lane = tile.first + row - column;
  return static_cast<uint64_t>(lane) < kLanes;
}

template <int kRows>
BCLIP_INLINE void sum_rows(const Tile& tile, int64_t row, const Factor& factor, Lanes offset,
                           float* rows, float* columns) {
  Lanes row_sums[kRows] = {};
  for (int64_t column = 0; column < tile.columns; column += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, tile.columns - column);
    Lanes column_sum = Load(columns + column);
    for (int i = 0; i < kRows; ++i) {
      const float* dots = tile.dots + (row + i) * tile.stride + column;
      Lanes e = Exp2Affine(LoadN(dots, count), factor, offset);
      if (count < kLanes) e = KeepFirstN(e, count);
      int64_t lane;
      if (holds_positive(tile, row + i, column, lane)) e = InsertLane(e, lane, 0.f);
      row_sums[i] += e;
      column_sum += e;
    }
    Store(columns + column, column_sum);
  }
  for (int i = 0; i < kRows; ++i) rows[row + i] = ReduceSum(row_sums[i]);
}

void exponential_sums(const Tile& tile, double factor, float offset, float* rows, double* columns) {
  // Single precision is accurate enough for the sums of this many rows.
  constexpr int64_t kRowsInSingle = 256;
  const Factor split(factor);
  alignas(64) float partial[kTileColumns];
  for (int64_t start = 0; start < tile.rows; start += kRowsInSingle) {
    const int64_t end = std::min(start + kRowsInSingle, tile.rows);
    std::fill_n(partial, kTileColumns, 0.f);
    int64_t row = start;
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce)
      sum_rows<kRowsAtOnce>(tile, row, split, Set(offset), rows, partial);
    for (; row < end; ++row) sum_rows<1>(tile, row, split, Set(offset), rows, partial);
    for (int64_t column = 0; column < tile.columns; ++column) columns[column] += partial[column];
  }
}

// -1 for each of 16 columns whose group is that of the row, else 0.
BCLIP_INLINE IntLanes same_group(int32_t row, const int32_t* columns, int64_t count) {
  if (count >= kLanes) return LoadAs<IntLanes>(columns) == row;
  int32_t ids[kLanes] = {};
  std::memcpy(ids, columns, count * sizeof(int32_t));
  return LoadAs<IntLanes>(ids) == row;
}

template <bool kGroups>
void softmax_gradient_of(const Tile& tile, const GradientTile& gradient) {
  const Factor factor(gradient.factor);
  for (int64_t row = 0; row < tile.rows; ++row) {
    const Lanes row_offset = Set(gradient.rows.offsets[row]),
                row_share = Set(gradient.rows.shares[row]);
    for (int64_t column = 0; column < tile.columns; column += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, tile.columns - column);
      float* dots = tile.dots + row * tile.stride + column;
      const Lanes x = LoadN(dots, count);
      const Lanes column_share = LoadN(gradient.columns.shares + column, count);
      Lanes g;
      if (gradient.one_offset) {
        g = Exp2Affine(x, factor, row_offset) * (row_share + column_share);
      } else {
        const Lanes column_offset = LoadN(gradient.columns.offsets + column, count);
        g = Exp2Affine(x, factor, row_offset) * row_share +
            Exp2Affine(x, factor, column_offset) * column_share;
      }
      int64_t lane;
      if constexpr (kGroups) {
        const Lanes share =
            LoadN(gradient.groups.column_shares + column, count) + gradient.groups.row_shares[row];
        g -= IfThenElse(
            same_group(gradient.groups.rows[row], gradient.groups.columns + column, count), share,
            Lanes{});
      } else if (holds_positive(tile, row, column, lane)) {
        g = InsertLane(g, lane, gradient.positive_grad[row]);
      }
      // Lanes outside the tile aren't stored.
      StoreN(dots, g, count);
    }
  }
}

void softmax_gradient(const Tile& tile, const GradientTile& gradient) {
  (gradient.groups.rows ? softmax_gradient_of<true> : softmax_gradient_of<false>)(tile, gradient);
}

template <bool kGroups>
SigmoidTileSums sigmoid_gradient_of(const Tile& tile, const SigmoidTile& sigmoid) {
  const Factor minus_log2_e(-1.4426950408889634);
  SigmoidTileSums sums = {};
  for (int64_t row = 0; row < tile.rows; ++row) {
    Lanes losses = {}, gradients = {};
    for (int64_t column = 0; column < tile.columns; column += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, tile.columns - column);
      float* dots = tile.dots + row * tile.stride + column;
      Lanes z = LoadN(dots, count) * sigmoid.scale + sigmoid.bias;  // -y S, so -S at the positive
      int64_t lane = 0;
      bool positive = false;
      IntLanes same = {};
      if constexpr (kGroups) {
        same = same_group(sigmoid.groups.rows[row], sigmoid.groups.columns + column, count);
        z = IfThenElse(same, -z, z);
      } else {
        positive = holds_positive(tile, row, column, lane);
        if (positive) z = NegateLane(z, lane);
      }
      const Lanes u = Exp2Affine(Abs(z), minus_log2_e, Lanes{});
      Lanes loss = IfThenElse(z > 0.f, z, Lanes{}) + Log1pUnit(u);
      // The comparison above would turn NaN into 0.
      loss = IfThenElse(z == z, loss, z);
      if (count < kLanes) loss = KeepFirstN(loss, count);
      losses += loss;
      if (!sigmoid.with_gradients) continue;
      Lanes g = IfThenElse(z > 0.f, Set(1.f), u) * (sigmoid.weight / (u + 1.f));
      if constexpr (kGroups) g = IfThenElse(same, -g, g);
      if (positive) g = NegateLane(g, lane);
      if (count < kLanes) g = KeepFirstN(g, count);
      gradients += g;
      StoreN(dots, g, count);
    }
    sums.loss += ReduceSum(losses);
    sums.gradient += ReduceSum(gradients);
  }
  return sums;
}

SigmoidTileSums sigmoid_gradient(const Tile& tile, const SigmoidTile& sigmoid) {
  return (sigmoid.groups.rows ? sigmoid_gradient_of<true> : sigmoid_gradient_of<false>)(tile,
                                                                                        sigmoid);
}

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
