// Log-sum-exps of the rows and of the columns of a tile of 128 x 256. One exponential serves both,
// with the highest logit of the warp as its offset. If a row or column of the warp has so small a
// sum that it loses digits, the warp computes its sums again. Each row and column then has its own
// maximum as its offset. No two threads write the same partial result, so atomics aren't needed.
#pragma once

#include "csrc/cuda/contrastive/wide_tile.cuh"

namespace bclip::cuda {

// The logarithms of the sums of the columns, for each warp, and the highest logits of the warps.
constexpr int kWideTops = kWideWarps * kWideColumns * 4;
constexpr int kWideForwardBytes = kWideTops + kWideWarps * 4;

struct WideRowSums {
  float sums[2] = {}, offsets[2];
};

// Computes the sums of a warp once more, with the highest logit of each row and column as its
// offset. `highest` is that of the warp, to which the columns' logarithms are relative.
__device__ __forceinline__ void sum_with_own_offsets(const WideNumbers& tile, float factor,
                                                     float highest, WideRowSums& rows,
                                                     Shared<float> logarithms) {
  rows.offsets[0] = rows.offsets[1] = kNoLogit;
  tile.each([&](int, int half, int, int, int, float number) {
    rows.offsets[half] = fmaxf(rows.offsets[half], number);
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& offset = rows.offsets[half];
    offset = fmaxf(offset, shuffle_xor(offset, 1));
    offset = fmaxf(offset, shuffle_xor(offset, 2)) * factor;
    rows.sums[half] = 0.0f;
  }
  tile.each([&](int, int half, int, int, int, float number) {
    rows.sums[half] += exponential(number, factor, rows.offsets[half]);
  });
#pragma unroll
  for (float& sum : rows.sums) {
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
  }
#pragma unroll
  for (int group = 0; group < WideNumbers::kBlocks / 4; ++group) {
    // Without it, the compiler of CUDA 12.4 overlaps the groups and runs out of registers.
    warp_barrier();
    float columns[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int block = 4 * group + i / 2;
      columns[i] = fmaxf(fmaxf(tile.at(block, 0, i % 2), tile.at(block, 1, i % 2)), kNoLogit);
    }
    const float top = fold_columns(columns, Greater()) * factor;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int block = 4 * group + i / 2;
      const float offset = shuffle(top, i * 4 + lane_index() % 4);
      columns[i] = exponential(tile.at(block, 0, i % 2), factor, offset) +
                   exponential(tile.at(block, 1, i % 2), factor, offset);
    }
    const float sum = fold_columns(columns, Add());
    logarithms.store(32 * group + column_of_lane(), top - highest + log2_fast(sum));
  }
}

// `numbers` are the dot products of the thread. `base` is the first byte of kWideForwardBytes of
// shared memory.
__device__ __forceinline__ void wide_forward(float (&numbers)[WideNumbers::kCount],
                                             const Features& features, const PartialSums& sums,
                                             const TilePlace& place, int thread, int base) {
  const WideNumbers tile{numbers, thread};
  const Shared<float> logarithms{base + tile.warp() * kWideColumns * 4}, tops{base + kWideTops};
  // In the units of ln 2, the logits are the products times `factor`. A plain tile keeps products,
  // whose order is that of the logits. Other tiles keep logits, of which some are minus infinity.
  float factor = load_global(features.scale) * kLog2E;
  const int shift = positives_of(features, place, kWideRows, kWideColumns);
  float highest = kNoLogit;
  if (is_plain(place, shift, kWideRows, kWideColumns) && factor > 0.0f) {
    tile.each([&](int, int, int, int, int, float& number) { highest = fmaxf(highest, number); });
    highest *= factor;
  } else {
    tile.each([&](int, int, int, int row, int column, float& number) {
      number = negative_logit(place, shift, row, column, number, factor);
      highest = fmaxf(highest, number);
    });
    factor = 1.0f;
  }
  highest = fold_warp(highest, Greater());

  WideRowSums rows;
  rows.offsets[0] = rows.offsets[1] = highest;
  float least = 1.0f;
  const bool has_rows = tile.warp() * 16 < place.rows;
#pragma unroll
  for (int group = 0; group < WideNumbers::kBlocks / 4; ++group) {
    float columns[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int block = 4 * group + i / 2;
      const float upper = exponential(tile.at(block, 0, i % 2), factor, highest);
      const float lower = exponential(tile.at(block, 1, i % 2), factor, highest);
      rows.sums[0] += upper;
      rows.sums[1] += lower;
      columns[i] = upper + lower;
    }
    const float sum = fold_columns(columns, Add());
    const int column = 32 * group + column_of_lane();
    least = fminf(least, has_rows && column < place.columns ? sum : 1.0f);
    logarithms.store(column, log2_fast(sum));
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& sum = rows.sums[half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    least = fminf(least, tile.row(half) < place.rows ? sum : 1.0f);
  }
  if (loses_digits(fold_warp(least, Less())))
    sum_with_own_offsets(tile, factor, highest, rows, logarithms);
  if (lane_index() == 0) tops.store(tile.warp(), highest);
  const int64_t first_row = int64_t(place.column / kWideColumns) * features.rows + place.row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile.row(half);
    if (lane_index() % 4 == 0 && row < place.rows) {
      store_global(&sums.rows[first_row + row], log_of_sum(rows.offsets[half], rows.sums[half]));
    }
    rejoin_lanes();
  }
  wide_barrier();

  // Each thread adds the sums of a column over the warps. Without a term the offset is kNoLogit,
  // because the difference of two infinities is NaN.
  const Shared<float> all{base};
  float logarithm[kWideWarps], top[kWideWarps], offset = kNoLogit, sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWideWarps; ++warp) {
    top[warp] = tops.load(warp);
    logarithm[warp] = all.load(warp * kWideColumns + thread);
    offset = fmaxf(offset, top[warp] + logarithm[warp]);
  }
#pragma unroll
  for (int warp = 0; warp < kWideWarps; ++warp)
    sum += exp2_fast(top[warp] - offset + logarithm[warp]);
  if (thread < place.columns) {
    const int64_t first = int64_t(place.row / kWideRows) * features.columns + place.column;
    store_global(&sums.columns[first + thread], log_of_sum(offset, sum));
  }
  // The next tile writes the memory again.
  wide_barrier();
}

}  // namespace bclip::cuda
