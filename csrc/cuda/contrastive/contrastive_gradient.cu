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
static_assert(kBlock + 16 <= kPipelineBytes);

struct Ids {
  Shared<int> rows{kExtrasOffset}, columns{kExtrasOffset + kExtraBytes};

  __device__ __forceinline__ void load(const Groups& groups, const TilePlace& tile) const {
    const int thread = thread_index();
    rows.store(thread, thread < tile.rows ? load_global(&groups.rows[tile.row + thread]) : -1);
    columns.store(thread,
                  thread < tile.columns ? load_global(&groups.columns[tile.column + thread]) : -2);
  }
};

__device__ __forceinline__ void store_gradient(Products& gradients, const GradientTile& to,
                                               const TilePlace& tile) {
  const Tile<Half, kSide> staged{{0}};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float (&pair)[4] = gradients.sums[i / 2][j];
      staged.memory.store_as<uint32_t>(
          staged.index_of_pair(Products::row_of(i / 2, i % 2), Products::column_of(j)),
          pack<Half>(pair[i % 2 * 2] * to.scale, pair[i % 2 * 2 + 1] * to.scale));
    }
  }
  block_barrier();
  Half* const grad = static_cast<Half*>(to.grad) + tile.row * to.stride + tile.column;
  for (int chunk = thread_index(); chunk < tile.rows * (kSide / 8); chunk += kThreads) {
    const int row = chunk / (kSide / 8), column = chunk % (kSide / 8) * 8;
    if (tile.column + column >= to.stride) continue;
    store_global(reinterpret_cast<Quad*>(grad + row * to.stride + column),
                 staged.memory.load_as<Quad>(staged.index(row, column)));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) softmax(SoftmaxArguments arguments) {
  const Features& features = arguments.features;
  const Normalizers& normalizers = arguments.normalizers;
  const Groups& groups = arguments.groups;
  const TilePlace tile = place_of_block(features);
  const Shared<float> block_memory{kBlock}, row_factors{kExtrasOffset + 2 * kExtraBytes},
      column_factors{kExtrasOffset + 3 * kExtraBytes};
  const Shared<float> row_near{kExtrasOffset + 4 * kExtraBytes},
      column_near{kExtrasOffset + 5 * kExtraBytes};
  const Shared<float> row_shares{kExtrasOffset + 6 * kExtraBytes},
      column_shares{kExtrasOffset + 7 * kExtraBytes};
  Products products;
  multiply_tile<T>(products, features, tile);

  // exp(S - R) + exp(S - Q) = exp(S - m) (exp(m - R) + exp(m - Q)) takes one exponential. It fails
  // if the R and Q of the tile are so far apart that no m serves both. A row without a loss has an
  // infinite R and the factor zero.
  const int thread = thread_index();
  const bool has_row = thread < tile.rows, has_column = thread < tile.columns;
  const float row = has_row ? load_global(&normalizers.rows_near[tile.row + thread]) : infinity();
  const float column =
      has_column ? load_global(&normalizers.columns_near[tile.column + thread]) : infinity();
  const float row_rest = has_row ? load_global(&normalizers.rows_rest[tile.row + thread]) : 0.0f;
  const float column_rest =
      has_column ? load_global(&normalizers.columns_rest[tile.column + thread]) : 0.0f;
  const float lowest = fold_block(fminf(row, column), block_memory, Less());
  block_barrier();
  const auto finite = [](float near) { return near == infinity() ? -infinity() : near; };
  const float highest = fold_block(fmaxf(finite(row), finite(column)), block_memory, Greater());
  const bool near = highest - lowest < 86.0f;
  const float middle = lowest == infinity() ? 0.0f : near ? (lowest + highest) * 0.5f : 0.0f;
  row_factors.store(thread, near ? exp2_fast(middle - row) * row_rest : row_rest);
  column_factors.store(thread, near ? exp2_fast(middle - column) * column_rest : column_rest);
  row_near.store(thread, row);
  column_near.store(thread, column);
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
  float sum = 0.0f;
  products.each([&](int, int, int row, int column, float& number) {
    const float product = number, logit = product * factor;
    // The bound avoids 0 * inf if neither the row nor the column has a loss.
    const float row_factor = row_factors.load(row), column_factor = column_factors.load(column);
    float gradient = near ? exp2_fast(fminf(logit - middle, 126.0f)) * (row_factor + column_factor)
                          : exp2_fast(logit - row_near.load(row)) * row_factor +
                                exp2_fast(logit - column_near.load(column)) * column_factor;
    const bool counted = row < tile.rows && column < tile.columns;
    if (column == row + shift && counted)
      gradient = load_global(&normalizers.positive_grad[tile.row + row]);
    if (groups.rows && ids.rows.load(row) == ids.columns.load(column)) {
      gradient -= row_shares.load(row) + column_shares.load(column);
    }
    number = counted ? gradient : 0.0f;
    sum += number * product;
  });
  store_gradient(products, arguments.tile, tile);
  block_barrier();
  sum = fold_block(sum, block_memory, Add());
  if (thread == 0) store_global(&arguments.tile.partials[block_index()], sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) sigmoid(SigmoidArguments arguments) {
  const Features& features = arguments.features;
  const Groups& groups = arguments.groups;
  const TilePlace tile = place_of_block(features);
  const Shared<float> block_memory{kBlock};
  Products products;
  multiply_tile<T>(products, features, tile);

  const Ids ids;
  if (groups.rows) {
    ids.load(groups, tile);
    block_barrier();
  }
  const float scale = load_global(features.scale),
              bias = arguments.bias ? load_global(arguments.bias) : 0.0f;
  const int shift = positives_of(features, tile);
  float loss = 0.0f, sum = 0.0f, product_sum = 0.0f;
  products.each([&](int, int, int row, int column, float& number) {
    const float product = number;
    const bool positive =
        column == row + shift || (groups.rows && ids.rows.load(row) == ids.columns.load(column));
    const float logit = positive ? -(product * scale + bias) : product * scale + bias;
    const float small = exp2_fast(-fabsf(logit) * kLog2E);
    const float probability = (logit >= 0.0f ? 1.0f : small) / (1.0f + small);
    const bool counted = row < tile.rows && column < tile.columns;
    loss += counted ? fmaxf(logit, 0.0f) + log1pf(small) : 0.0f;
    number = counted ? positive ? -probability : probability : 0.0f;
    sum += number;
    product_sum += number * product;
  });
  if (arguments.tile.grad) store_gradient(products, arguments.tile, tile);
  const float values[3] = {product_sum, sum, loss};
  float totals[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    block_barrier();
    totals[i] = fold_block(values[i], block_memory, Add());
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
