// G of a tile of 128 x 256. For the softmax, G follows from the log-sum-exps of the forward pass.
// For the sigmoid, the tile also computes its loss. Each warp stages its part of G in shared
// memory, so that stores are whole cache lines.
#pragma once

#include "csrc/cuda/contrastive/wide_tile.cuh"

namespace bclip::cuda {

// A warp stages 16 rows and 64 columns of G at a time.
constexpr int kStagedColumns = 64;
constexpr int kWarpStageBytes = Tile<Half, kStagedColumns>::bytes(16);
constexpr int kWideFactors = kWideWarps * kWarpStageBytes;
constexpr int kWideTotals = kWideFactors + 2 * (kWideRows + kWideColumns) * 4;
constexpr int kWideGradientBytes = kWideTotals + 3 * kWideWarps * 4;

// Calls visit(half, odd, row, column, number) for each number, which becomes scale * G / w, and
// stores it if there is a G. Columns are stored as soon as they are visited, so that their
// registers are free. The tile is complete if kComplete.
template <bool kComplete, class Visit>
__device__ __forceinline__ void store_wide(const WideNumbers& tile, const GradientTile& to,
                                           const TilePlace& place, int base, Visit&& visit) {
  const Tile<Half, kStagedColumns> staged{{base + tile.warp() * kWarpStageBytes}};
  constexpr int kLanes = kStagedColumns / 8, kRows = 32 / kLanes;
  const int lane = lane_index(), row = lane / kLanes, column = lane % kLanes * 8;
  const int first = staged.index_of_pair(lane / 4, lane % 4 * 2);
  const int64_t place_of_row = (place.row + tile.warp() * 16 + row) * to.stride;
  Half* const address = static_cast<Half*>(to.grad) + place_of_row + place.column + column;
  const int rows = place.rows - tile.warp() * 16 - row;
#pragma unroll
  for (int pass = 0; pass < kWideColumns / kStagedColumns; ++pass) {
    const int first_column = pass * kStagedColumns;
    // Columns after the last one have neither a sum nor a place in G.
    if (!kComplete && first_column >= place.columns) break;
#pragma unroll
    for (int block = pass * kLanes; block < (pass + 1) * kLanes; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          visit(half, odd, tile.row(half), tile.column(block, odd), tile.at(block, half, odd));
          rejoin_lanes();
        }
      }
    }
    if (!to.grad) continue;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int block = pass * kLanes + i;
        // Chunk i is at the exclusive or of i and the place of chunk 0, and rows that are 8 apart
        // permute their chunks alike.
        staged.memory.store_as<uint32_t>(
            (first ^ i * 8) + half * 8 * kStagedColumns,
            pack<Half>(tile.at(block, half, 0), tile.at(block, half, 1)));
      }
    }
    warp_barrier();
    Quad chunks[16 / kRows];
#pragma unroll
    for (int i = 0; i < 16 / kRows; ++i)
      chunks[i] = staged.memory.load_as<Quad>(staged.index(row + i * kRows, column));
    warp_barrier();
    const bool inside = place.column + first_column + column < to.stride;
#pragma unroll
    for (int i = 0; i < 16 / kRows; ++i) {
      if (kComplete || (inside && i * kRows < rows)) {
        store_global(reinterpret_cast<Quad*>(address + i * kRows * to.stride + first_column),
                     chunks[i]);
      }
      rejoin_lanes();
    }
  }
}

// `numbers` are the dot products of the thread. `base` is the first byte of kWideGradientBytes of
// shared memory.
__device__ __forceinline__ void wide_softmax(float (&numbers)[WideNumbers::kCount],
                                             const Features& features,
                                             const Normalizers& normalizers, const GradientTile& to,
                                             const TilePlace& place, int thread, int base) {
  const WideNumbers tile{numbers, thread};
  const Shared<float> row_factors{base + kWideFactors},
      column_factors{base + kWideFactors + kWideRows * 4},
      row_near{base + kWideFactors + (kWideRows + kWideColumns) * 4},
      column_near{base + kWideFactors + (2 * kWideRows + kWideColumns) * 4};
  const auto near_of_row = [&](int row) {
    return row < place.rows ? load_global(&normalizers.rows_near[place.row + row]) : infinity();
  };
  const auto near_of_column = [&](int column) {
    return column < place.columns ? load_global(&normalizers.columns_near[place.column + column])
                                  : infinity();
  };
  // Each warp reads all of them, so the warps agree without a barrier.
  float lowest = infinity(), highest = -infinity(), highest_finite = -infinity();
  const auto widen = [&](float near) {
    lowest = fminf(lowest, near);
    highest = fmaxf(highest, near);
    highest_finite = fmaxf(highest_finite, finite_or_lowest(near));
    rejoin_lanes();
  };
#pragma unroll
  for (int row = 0; row < kWideRows; row += 32) widen(near_of_row(row + lane_index()));
#pragma unroll
  for (int column = 0; column < kWideColumns; column += 32)
    widen(near_of_column(column + lane_index()));
  const bool every_loss = fold_warp(highest, Greater()) < infinity();
  const Middle middle(fold_warp(lowest, Less()), fold_warp(highest_finite, Greater()));
  const auto factor_of = [&](bool inside, const float* rest, int index, float near) {
    return middle.factor(near, inside ? load_global(rest + index) * to.scale : 0.0f);
  };
  if (thread < kWideRows) {
    const float near = near_of_row(thread);
    row_factors.store(
        thread, factor_of(thread < place.rows, normalizers.rows_rest, place.row + thread, near));
    row_near.store(thread, near);
  }
  rejoin_lanes();
  const float near = near_of_column(thread);
  column_factors.store(thread, factor_of(thread < place.columns, normalizers.columns_rest,
                                         place.column + thread, near));
  column_near.store(thread, near);
  wide_barrier();

  const float factor = load_global(features.scale) * kLog2E;
  const int shift = positives_of(features, place, kWideRows, kWideColumns);
  float sums[4] = {};
  if (middle.near && every_loss && is_plain(place, shift, kWideRows, kWideColumns)) {
    const float of_rows[2] = {row_factors.load(tile.row(0)), row_factors.load(tile.row(1))};
    Pair of_columns;
    store_wide<true>(tile, to, place, base, [&](int half, int odd, int, int column, float& number) {
      if (half + odd == 0) of_columns = column_factors.load_as<Pair>(column);
      const float product = number;
      number = softmax_gradient(product, factor, middle.value, of_rows[half],
                                odd ? of_columns.high : of_columns.low);
      sums[2 * half + odd] += number * product;
    });
  } else {
    store_wide<false>(
        tile, to, place, base, [&](int half, int, int row, int column, float& number) {
          const float product = number, logit = product * factor;
          const float of_row = row_factors.load(row), of_column = column_factors.load(column);
          float gradient = middle.near ? bounded_gradient(logit, middle.value, of_row, of_column)
                                       : split_gradient(logit, row_near.load(row), of_row,
                                                        column_near.load(column), of_column);
          const bool counted = is_inside(place, row, column);
          if (column == row + shift && counted)
            gradient = load_global(&normalizers.positive_grad[place.row + row]) * to.scale;
          number = counted ? gradient : 0.0f;
          sums[half] += number * product;
        });
  }
  // The factors aren't in use after the barrier of the totals, nor the totals after the next tile's
  // first barrier.
  store_totals({total(sums) * to.per_scale}, {base + kWideTotals},
               to.partials + wide_index(features, place), thread);
}

// As wide_softmax. `bias` may be null.
__device__ __forceinline__ void wide_sigmoid(float (&numbers)[WideNumbers::kCount],
                                             const Features& features, const float* bias,
                                             const GradientTile& to, const TilePlace& place,
                                             int thread, int base) {
  const WideNumbers tile{numbers, thread};
  // Logits are in units of ln 2, and G in those of the output.
  const float scale = load_global(features.scale) * kLog2E,
              offset = (bias ? load_global(bias) : 0.0f) * kLog2E;
  const int shift = positives_of(features, place, kWideRows, kWideColumns);
  SigmoidSums sums;
  if (is_plain(place, shift, kWideRows, kWideColumns)) {
    store_wide<true>(tile, to, place, base, [&](int half, int odd, int, int, float& number) {
      const float product = number;
      number = sums.add(2 * half + odd, product * scale + offset, to.per_scale);
      sums.add_gradient(2 * half + odd, number, product);
    });
  } else {
    store_wide<false>(tile, to, place, base,
                      [&](int half, int odd, int row, int column, float& number) {
                        const float product = number, logit = product * scale + offset;
                        const bool positive = column == row + shift;
                        // A logit of minus infinity has neither a loss nor a gradient.
                        number = sums.add(2 * half + odd,
                                          !is_inside(place, row, column) ? -infinity()
                                          : positive                     ? -logit
                                                                         : logit,
                                          to.per_scale);
                        if (positive) number = -number;
                        sums.add_gradient(half, number, product);
                      });
  }
  // Thread 0 has read the totals of the tile before when it reaches the barrier.
  wide_barrier();
  store_totals(
      {total(sums.products) * to.per_scale, total(sums.gradients) * to.per_scale, sums.loss()},
      {base + kWideTotals}, to.partials + 3 * wide_index(features, place), thread);
}

}  // namespace bclip::cuda
