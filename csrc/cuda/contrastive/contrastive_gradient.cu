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

__device__ __forceinline__ float total(const float (&parts)[4]) {
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// Stores scale * G / w.
__device__ __forceinline__ void store_gradient(const Products& gradients, const GradientTile& to,
                                               const TilePlace& tile) {
  const Tile<Half, kSide> staged{{0}};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    // Rows that are 8 apart have their chunks in the same order.
    const int first = staged.index_of_pair(Products::row_of(0, 0), Products::column_of(j));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float (&pair)[4] = gradients.sums[i / 2][j];
      staged.memory.store_as<uint32_t>(first + i * 8 * staged.kStride,
                                       pack<Half>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]));
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
  const float unit = arguments.tile.scale;
  const bool has_row = thread < tile.rows, has_column = thread < tile.columns;
  const float row = has_row ? load_global(&normalizers.rows_near[tile.row + thread]) : infinity();
  const float column =
      has_column ? load_global(&normalizers.columns_near[tile.column + thread]) : infinity();
  const float row_rest =
      has_row ? load_global(&normalizers.rows_rest[tile.row + thread]) * unit : 0.0f;
  const float column_rest =
      has_column ? load_global(&normalizers.columns_rest[tile.column + thread]) * unit : 0.0f;
  const float lowest = fold_block(fminf(row, column), block_memory, Less());
  block_barrier();
  float highest = fold_block(fmaxf(row, column), block_memory, Greater());
  const bool every_loss = highest < infinity();
  if (!every_loss) {
    const auto finite = [](float near) { return near == infinity() ? -infinity() : near; };
    block_barrier();
    highest = fold_block(fmaxf(finite(row), finite(column)), block_memory, Greater());
  }
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
  float sums[4] = {};
  if (near && every_loss && is_plain(tile, shift) && !groups.rows) {
    // S is at most R and Q, so nothing overflows.
    float row_factor[8], column_factor[16];
    row_values(row_factor, row_factors);
    column_values(column_factor, column_factors);
    products.each([&](int i, int j, int, int, float& number) {
      const float product = number;
      number = exp2_fast(product * factor - middle) * (row_factor[i] + column_factor[j]);
      sums[j % 4] += number * product;
    });
  } else {
    products.each([&](int, int, int row, int column, float& number) {
      const float product = number, logit = product * factor;
      // The bound avoids 0 * inf if neither the row nor the column has a loss.
      const float row_factor = row_factors.load(row), column_factor = column_factors.load(column);
      float gradient = near
                           ? exp2_fast(fminf(logit - middle, 126.0f)) * (row_factor + column_factor)
                           : exp2_fast(logit - row_near.load(row)) * row_factor +
                                 exp2_fast(logit - column_near.load(column)) * column_factor;
      const bool counted = row < tile.rows && column < tile.columns;
      if (column == row + shift && counted)
        gradient = load_global(&normalizers.positive_grad[tile.row + row]) * unit;
      rejoin_lanes();
      if (groups.rows && ids.rows.load(row) == ids.columns.load(column)) {
        gradient -= (row_shares.load(row) + column_shares.load(column)) * unit;
      }
      number = counted ? gradient : 0.0f;
      sums[0] += number * product;
    });
  }
  store_gradient(products, arguments.tile, tile);
  block_barrier();
  const float sum = fold_block(total(sums), block_memory, Add()) / unit;
  if (thread == 0) store_global(&arguments.tile.partials[block_index()], sum);
}

// log(1 + x) for x >= 0, to a relative 3e-7. Below 1 it is x times the Chebyshev interpolant of
// log(1 + x) / x.
__device__ __forceinline__ float log1p_fast(float x) {
  float series = x * 0.00512610212f - 0.0290740646f;
  series = series * x + 0.0775160866f;
  series = series * x - 0.136022476f;
  series = series * x + 0.190768807f;
  series = series * x - 0.24835399f;
  series = series * x + 0.333181217f;
  series = series * x - 0.49999445f;
  series = series * x + 0.999999966f;
  return x < 1.0f ? x * series : log2_fast(1.0f + x) * kLn2;
}

// The sums of a thread. Each has 4 parts, so that neighbouring elements don't wait for each other.
struct SigmoidSums {
  float gradients[4] = {}, products[4] = {}, linear[4] = {}, growth[4] = {};

  // Adds the loss of an element, and returns its unit * sigmoid. `logit` is in units of ln 2. The
  // sum of log(1 + small) is the logarithm of a product, so it takes a logarithm for each part, not
  // for each element. `growth` is the product less 1, and so keeps the digits of small terms. A
  // part multiplies 32 numbers of at most 2.
  __device__ __forceinline__ float add(int part, float logit, float per_unit) {
    const float small = exp2_fast(-fabsf(logit));
    growth[part] = growth[part] * small + (growth[part] + small);
    linear[part] += fmaxf(logit, 0.0f);
    return (logit >= 0.0f ? 1.0f : small) * reciprocal_fast(small * per_unit + per_unit);
  }
  __device__ __forceinline__ void add_gradient(int part, float gradient, float product) {
    gradients[part] += gradient;
    products[part] += gradient * product;
  }
  __device__ __forceinline__ float loss() const {
    float logarithms = 0.0f;
#pragma unroll
    for (float one : growth) logarithms += log1p_fast(one);
    return total(linear) * kLn2 + logarithms;
  }
};

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
  // Logits are in units of ln 2, and G in those of the output.
  const float scale = load_global(features.scale) * kLog2E,
              bias = (arguments.bias ? load_global(arguments.bias) : 0.0f) * kLog2E;
  const float per_unit = 1.0f / arguments.tile.scale;
  const int shift = positives_of(features, tile);
  SigmoidSums sums;
  if (is_plain(tile, shift) && !groups.rows) {
    products.each([&](int, int j, int, int, float& number) {
      const float product = number;
      number = sums.add(j % 4, product * scale + bias, per_unit);
      sums.add_gradient(j % 4, number, product);
    });
  } else {
    products.each([&](int, int j, int row, int column, float& number) {
      const float product = number, logit = product * scale + bias;
      const bool positive =
          column == row + shift || (groups.rows && ids.rows.load(row) == ids.columns.load(column));
      const bool counted = row < tile.rows && column < tile.columns;
      // A logit of minus infinity has neither a loss nor a gradient.
      number = sums.add(j % 4, !counted ? -infinity() : positive ? -logit : logit, per_unit);
      if (positive) number = -number;
      sums.add_gradient(j % 4, number, product);
    });
  }
  if (arguments.tile.grad) store_gradient(products, arguments.tile, tile);
  const float values[3] = {total(sums.products) * per_unit, total(sums.gradients) * per_unit,
                           sums.loss()};
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
