// Log-sum-exps of the rows and of the columns of each tile of S. One exponential serves both, with
// the highest logit of the tile as its offset. If a row or column has so small a sum that it loses
// digits, the tile is computed again. Each row and column then has its own maximum as its offset.
// No two threads write the same partial result, so atomics aren't needed.
#include "csrc/cuda/contrastive/contrastive.cuh"

namespace bclip::cuda {
namespace {

struct Arguments {
  Features features;
  PartialSums sums;
};

// After the pipeline, its memory holds the sums of rows, columns and the block, and the block's
// least sum.
constexpr int kRows = 0, kColumns = kRows + 2 * kSide * 4, kBlock = kColumns + 2 * kSide * 4,
              kVote = kBlock + 16;

template <class T>
__global__ void __launch_bounds__(kThreads, 2) forward(Arguments arguments) {
  const Features& features = arguments.features;
  const TilePlace tile = place_of_block(features);
  const Shared<float> row_memory{kRows}, column_memory{kColumns}, block_memory{kBlock},
      vote_memory{kVote};
  Products products;
  multiply_tile<T>(products, features, tile);

  // In the units of ln 2, the logits are the products times `factor`. A plain tile keeps products,
  // whose order is that of the logits. Other tiles keep logits, of which some are minus infinity.
  float factor = load_global(features.scale) * kLog2E;
  const int shift = positives_of(features, tile);
  float highest = kNoLogit;
  if (is_plain(tile, shift) && factor > 0.0f) {
    products.each([&](int, int, int, int, float& number) { highest = fmaxf(highest, number); });
    highest *= factor;
  } else {
    products.each([&](int, int, int row, int column, float& number) {
      number = negative_logit(tile, shift, row, column, number, factor);
      highest = fmaxf(highest, number);
    });
    factor = 1.0f;
  }
  highest = fold_block(highest, block_memory, Greater());

  float rows[8] = {}, columns[16] = {};
  products.each([&](int i, int j, int, int, float& number) {
    const float term = exponential(number, factor, highest);
    rows[i] += term;
    columns[j] += term;
  });
  fold_rows(rows, row_memory, Add());
  fold_columns(columns, column_memory, Add());
  block_barrier();
  const int thread = thread_index();
  float row_sum = folded(row_memory, thread, Add()),
        column_sum = folded(column_memory, thread, Add());
  float row_offset = highest, column_offset = highest;
  const float least =
      fminf(thread < tile.rows ? row_sum : 1.0f, thread < tile.columns ? column_sum : 1.0f);
  if (loses_digits(fold_block(least, vote_memory, Less()))) {
    float row_highest[8], column_highest[16];
#pragma unroll
    for (int i = 0; i < 8; ++i) row_highest[i] = kNoLogit;
#pragma unroll
    for (int j = 0; j < 16; ++j) column_highest[j] = kNoLogit;
    products.each([&](int i, int j, int, int, float& number) {
      row_highest[i] = fmaxf(row_highest[i], number);
      column_highest[j] = fmaxf(column_highest[j], number);
    });
    fold_rows(row_highest, row_memory, Greater());
    fold_columns(column_highest, column_memory, Greater());
    block_barrier();
    row_offset = folded(row_memory, thread, Greater()) * factor;
    column_offset = folded(column_memory, thread, Greater()) * factor;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      row_highest[i] = folded(row_memory, Products::row_of(i / 2, i % 2), Greater()) * factor;
      rows[i] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      column_highest[j] =
          folded(column_memory, Products::column_of(j / 2) + j % 2, Greater()) * factor;
      columns[j] = 0.0f;
    }
    products.each([&](int i, int j, int, int, float& number) {
      rows[i] += exponential(number, factor, row_highest[i]);
      columns[j] += exponential(number, factor, column_highest[j]);
    });
    block_barrier();
    fold_rows(rows, row_memory, Add());
    fold_columns(columns, column_memory, Add());
    block_barrier();
    row_sum = folded(row_memory, thread, Add());
    column_sum = folded(column_memory, thread, Add());
  }
  if (thread < tile.rows) {
    const int64_t index = int64_t(tile.column / kSide) * features.rows + tile.row + thread;
    store_global(&arguments.sums.rows[index], log_of_sum(row_offset, row_sum));
  }
  if (thread < tile.columns) {
    const int64_t index = int64_t(tile.row / kSide) * features.columns + tile.column + thread;
    store_global(&arguments.sums.columns[index], log_of_sum(column_offset, column_sum));
  }
}

}  // namespace

TileIndex contrastive_tile(int block, int row_tiles, int column_tiles, int width) {
  return tile_of_block(block, row_tiles, column_tiles, width);
}

void contrastive_forward(const Features& features, const PartialSums& sums) {
  launch(features.bfloat16 ? forward<Bfloat16> : forward<Half>,
         {blocks_of(features), kThreads, kPipelineBytes, features.stream},
         Arguments{features, sums});
}

}  // namespace bclip::cuda
