// Tiles of G. Each tile recomputes its part of S once. For the softmax, G follows from the
// log-sum-exps of the forward pass. For the sigmoid, the tile also computes its loss. G / w is in
// [-2, 2]. It is written in float16 times a power of two, through shared memory, so that stores are
// whole cache lines.
#include "csrc/cuda/contrastive/contrastive.cuh"

#include <cmath>

namespace bclip::cuda {
namespace {

struct SoftmaxArguments {
  Features features;
  Normalizers normalizers;
  Groups groups;
  GradientTile tile;
};

struct SigmoidArguments {
  Features features;
  const float* bias;
  Groups groups;
  GradientTile tile;
};

// After the pipeline, its memory holds G, the values of each row and column of the tile, and the
// sums of the block.
constexpr int kExtrasOffset = Tile<Half, kSide>::bytes(kSide), kExtraBytes = kSide * 4,
              kBlock = kExtrasOffset + 8 * kExtraBytes;
static_assert(kBlock + 3 * 16 <= kPipelineBytes);

struct Ids {
  Shared<int> rows{kExtrasOffset}, columns{kExtrasOffset + kExtraBytes};

  __device__ __forceinline__ void load(const Groups& groups, const TilePlace& tile) const {
    const int thread = thread_index();
    rows.store(thread, thread < tile.rows ? load_global(&groups.rows[tile.row + thread]) : -1);
    columns.store(thread,
                  thread < tile.columns ? load_global(&groups.columns[tile.column + thread]) : -2);
  }
};

// The lowest `low` and the highest `high` of the block. `memory` takes 4 pairs.
__device__ __forceinline__ Pair range_of_block(Pair range, Shared<Pair> memory) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    range.low = fminf(range.low, shuffle_xor(range.low, mask));
    range.high = fmaxf(range.high, shuffle_xor(range.high, mask));
  }
  if (lane_index() == 0) memory.store(warp_index(), range);
  block_barrier();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    const Pair other = memory.load(warp);
    range.low = fminf(range.low, other.low);
    range.high = fmaxf(range.high, other.high);
  }
  return range;
}

// Stores scale * G / w. The tile is complete if kComplete.
template <bool kComplete>
__device__ __forceinline__ void store_gradient(const Products& gradients, const GradientTile& to,
                                               const TilePlace& tile) {
  const Tile<Half, kSide> staged{{0}};
  const int first = staged.index_of_pair(Products::row_of(0, 0), Products::column_of(0));
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      // Chunk j is at the exclusive or of j and the place of chunk 0, and rows that are 8 apart
      // permute their chunks alike.
      const float (&pair)[4] = gradients.sums[i / 2][j];
      staged.memory.store_as<uint32_t>((first ^ j * 8) + i * 8 * kSide,
                                       pack<Half>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]));
    }
  }
  block_barrier();
  // The block stores 8 rows at once. Loads from shared memory don't wait for each other, and only
  // stores have a condition.
  constexpr int kLanes = kSide / 8, kRows = kThreads / kLanes;
  const auto thread = static_cast<unsigned>(thread_index());
  const int row = thread / kLanes, column = thread % kLanes * 8;
  const int from = staged.index(row, column);
  Quad chunks[kSide / kRows];
#pragma unroll
  for (int i = 0; i < kSide / kRows; ++i)
    chunks[i] = staged.memory.load_as<Quad>(from + i * kRows * kSide);
  // A sum of integers takes fewer instructions than the same sum of a pointer.
  const int64_t place = (tile.row + row) * to.stride + tile.column + column;
  auto address = reinterpret_cast<uintptr_t>(static_cast<Half*>(to.grad) + place);
  const int rows = tile.column + column < to.stride ? tile.rows - row : 0;
#pragma unroll
  for (int i = 0; i < kSide; i += kRows, address += kRows * 2 * to.stride) {
    if (kComplete || i < rows) store_global(reinterpret_cast<Quad*>(address), chunks[i / kRows]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) softmax(SoftmaxArguments arguments) {
  const Features& features = arguments.features;
  const Normalizers& normalizers = arguments.normalizers;
  const Groups& groups = arguments.groups;
  const TilePlace tile = place_of_block(features);
  const Shared<float> row_factors{kExtrasOffset + 2 * kExtraBytes},
      column_factors{kExtrasOffset + 3 * kExtraBytes};
  const Shared<float> row_near{kExtrasOffset + 4 * kExtraBytes},
      column_near{kExtrasOffset + 5 * kExtraBytes};
  const Shared<float> row_shares{kExtrasOffset + 6 * kExtraBytes},
      column_shares{kExtrasOffset + 7 * kExtraBytes};
  Products products;
  multiply_tile<T>(products, features, tile);

  const int thread = thread_index();
  const float unit = arguments.tile.scale;
  const bool has_row = thread < tile.rows, has_column = thread < tile.columns;
  const float row = has_row ? load_global(&normalizers.rows_near[tile.row + thread]) : infinity();
  const float column =
      has_column ? load_global(&normalizers.columns_near[tile.column + thread]) : infinity();
  const float row_rest =
      has_row ? load_global(&normalizers.rows_rest[tile.row + thread]) * unit : 0.0f;
  const float column_rest =
      has_column ? load_global(&normalizers.columns_rest[tile.column + thread]) * unit : 0.0f;
  const Pair range = range_of_block({fminf(row, column), fmaxf(row, column)}, {kBlock});
  const float lowest = range.low;
  float highest = range.high;
  const bool every_loss = highest < infinity();
  if (!every_loss) {
    highest = fold_block(fmaxf(finite_or_lowest(row), finite_or_lowest(column)), {kBlock + 2 * 16},
                         Greater());
  }
  const Middle middle(lowest, highest);
  row_factors.store(thread, middle.factor(row, row_rest));
  column_factors.store(thread, middle.factor(column, column_rest));
  if (!middle.near) {
    row_near.store(thread, row);
    column_near.store(thread, column);
  }
  const Ids ids;
  if (groups.rows) {
    ids.load(groups, tile);
    row_shares.store(thread, has_row ? load_global(&groups.row_shares[tile.row + thread]) : 0.0f);
    column_shares.store(
        thread, has_column ? load_global(&groups.column_shares[tile.column + thread]) : 0.0f);
  }
  block_barrier();

  const float factor = load_global(features.scale) * kLog2E;
  const int shift = positives_of(features, tile);
  float sums[2] = {};  // two, so that neighbouring elements don't wait for each other
  if (middle.near && every_loss && is_plain(tile, shift) && !groups.rows) {
    float row_factor[8], column_factor[16];
    row_values(row_factor, row_factors);
    column_values(column_factor, column_factors);
    products.each([&](int i, int j, int, int, float& number) {
      const float product = number;
      number = softmax_gradient(product, factor, middle.value, row_factor[i], column_factor[j]);
      sums[j % 2] += number * product;
    });
    store_gradient<true>(products, arguments.tile, tile);
  } else {
    products.each([&](int, int, int row, int column, float& number) {
      const float product = number, logit = product * factor;
      const float row_factor = row_factors.load(row), column_factor = column_factors.load(column);
      float gradient = middle.near
                           ? bounded_gradient(logit, middle.value, row_factor, column_factor)
                           : split_gradient(logit, row_near.load(row), row_factor,
                                            column_near.load(column), column_factor);
      const bool counted = is_inside(tile, row, column);
      if (column == row + shift && counted)
        gradient = load_global(&normalizers.positive_grad[tile.row + row]) * unit;
      if (groups.rows && ids.rows.load(row) == ids.columns.load(column)) {
        gradient -= (row_shares.load(row) + column_shares.load(column)) * unit;
      }
      number = counted ? gradient : 0.0f;
      sums[0] += number * product;
    });
    store_gradient<false>(products, arguments.tile, tile);
  }
  // The range's memory isn't in use any more.
  const float sum = fold_block(sums[0] + sums[1], {kBlock}, Add()) * arguments.tile.per_scale;
  if (thread == 0) store_global(&arguments.tile.partials[block_index()], sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) sigmoid(SigmoidArguments arguments) {
  const Features& features = arguments.features;
  const Groups& groups = arguments.groups;
  const TilePlace tile = place_of_block(features);
  Products products;
  multiply_tile<T>(products, features, tile);

  const Ids ids;
  if (groups.rows) {
    ids.load(groups, tile);
    block_barrier();
  }
  // Logits are in units of ln 2, and G in those of the output.
  const float scale = load_global(features.scale) * kLog2E,
              bias = (arguments.bias ? load_global(arguments.bias) : 0.0f) * kLog2E;
  const float per_unit = arguments.tile.per_scale;
  const int shift = positives_of(features, tile);
  SigmoidSums sums;
  if (is_plain(tile, shift) && !groups.rows) {
    products.each([&](int, int j, int, int, float& number) {
      const float product = number;
      number = sums.add(j % 4, product * scale + bias, per_unit);
      sums.add_gradient(j % 4, number, product);
    });
    if (arguments.tile.grad) store_gradient<true>(products, arguments.tile, tile);
  } else {
    products.each([&](int, int j, int row, int column, float& number) {
      const float product = number, logit = product * scale + bias;
      const bool positive =
          column == row + shift || (groups.rows && ids.rows.load(row) == ids.columns.load(column));
      const bool counted = is_inside(tile, row, column);
      // A logit of minus infinity has neither a loss nor a gradient.
      number = sums.add(j % 4, !counted ? -infinity() : positive ? -logit : logit, per_unit);
      if (positive) number = -number;
      sums.add_gradient(0, number, product);
    });
    if (arguments.tile.grad) store_gradient<false>(products, arguments.tile, tile);
  }
  const float values[3] = {total(sums.products) * per_unit, total(sums.gradients) * per_unit,
                           sums.loss()};
  float totals[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    totals[i] = fold_block(values[i], {kBlock + 16 * i}, Add());
  }
  if (thread_index() == 0) {
#pragma unroll
    for (int i = 0; i < 3; ++i)
      store_global(&arguments.tile.partials[block_index() * 3 + i], totals[i]);
  }
}

}  // namespace

void contrastive_softmax(const Features& features, const Normalizers& normalizers,
                         const Groups& groups, const GradientTile& tile) {
  launch(features.bfloat16 ? softmax<Bfloat16> : softmax<Half>,
         {blocks_of(features), kThreads, kPipelineBytes, features.stream},
         SoftmaxArguments{features, normalizers, groups, tile});
}

void contrastive_sigmoid(const Features& features, const float* bias, const Groups& groups,
                         const GradientTile& tile) {
  launch(features.bfloat16 ? sigmoid<Bfloat16> : sigmoid<Half>,
         {blocks_of(features), kThreads, kPipelineBytes, features.stream},
         SigmoidArguments{features, bias, groups, tile});
}

}  // namespace bclip::cuda
