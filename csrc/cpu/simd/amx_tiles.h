// All dot products of two sets of features on the matrix unit of x86 (AMX), 32 x 32 at a time. The
// vector units consume the previous 32 x 32 in the meantime.
#pragma once

#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd/amx.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

// Elements of K at a time: their two layouts are 1 MiB and stay in L2.
constexpr int64_t kBlockElements = 512 * 512;
constexpr int64_t kQueryRows = 1024;  // rows of Q that share one packing of a block of K

[[maybe_unused]] int64_t tasks_of(int64_t rows) { return (rows + kQueryRows - 1) / kQueryRows; }

// The number of rows of K in a block.
int64_t block_rows(int64_t width, int64_t count) {
  return std::min(padded(count),
                  std::max<int64_t>(kPanel, kBlockElements / padded(width) / kPanel * kPanel));
}

// The position of 32 x 32 dot products: rows of Q from `row` on, and rows of K from `column` on.
struct TilePosition {
  int64_t row, column;
  uint32_t columns;  // a mask of the rows of K that exist
  // The positive of row i of Q is in column lane + i, if this number is from 0 to 31.
  int64_t lane;
};

// The half of a mask for 32 columns that belongs to 16 of them.
BCLIP_INLINE __mmask16 half_of(uint32_t mask, int64_t half) {
  return static_cast<__mmask16>(mask >> (half * kHalf));
}

// The memory of a thread for for_each_tile.
struct TileMemory {
  TileMemory(int64_t query_rows, int64_t key_rows, int64_t width, bool with_gradient)
      : block(block_rows(width, key_rows)),
        dots(2 * kStep),
        query(padded(query_rows) * padded(width)),
        across(block * padded(width)),
        pairs(with_gradient ? block * padded(width) : 0),
        gradient(with_gradient ? kPanel * block : 0),
        result(with_gradient ? padded(query_rows) * padded(width) : 0) {}

  const int64_t block;  // rows of K at a time
  const Scratch<float> dots;
  const Scratch<uint16_t> query, across, pairs, gradient;
  const Scratch<float> result;  // O: [rows of Q / 32][D / 32][32 rows][32 columns]
};

// Multiplies the rows [begin, end) of Q with the rows [from, to) of K, and hands the dot products
// to the consumer. The positive of row i of Q is row i + shift of K.
//
// For each block of K it calls consumer.begin_block(first row, count) and, at the end, end_block().
// In between it calls, for each panel of Q, begin_panel(), row(position, i, dot products, gradient)
// for each row of each tile, and end_panel(first row, count). A consumer with kWithGradient writes
// G to `gradient`, and O += G K follows.
template <typename TileConsumer>
void for_each_tile(const Features& query, int64_t begin, int64_t end, const Features& key,
                   int64_t from, int64_t to, int64_t shift, const TileMemory& memory,
                   TileConsumer& consumer) {
  const int64_t steps = panels_of(query.width);
  const int64_t rows_a_step = (kPanel + steps - 1) / steps;
  float* const dots = memory.dots.data;
  const uint16_t* const across = memory.across.data;
  for (int64_t row = begin; row < end; row += kPanel)
    pack_rows(query, row, memory.query.data + (row - begin) * padded(query.width));
  for (int64_t block = from; block < to; block += memory.block) {
    const int64_t count = std::min(memory.block, to - block), column_panels = panels_of(count);
    pack_across(key, block, count, memory.across.data);
    if (TileConsumer::kWithGradient) pack_pairs(key, block, count, memory.pairs.data);
    consumer.begin_block(block, count);
    for (int64_t row = begin; row < end; row += kPanel) {
      const int64_t rows = std::min(kPanel, end - row);
      const uint16_t* query_panel = memory.query.data + (row - begin) * padded(query.width);
      consumer.begin_panel();
      for (int64_t panel = 0; panel <= column_panels; ++panel) {
        // Consumes the rows of the previous tile between the steps of this one.
        const int64_t column = block + (panel - 1) * kPanel, left = block + count - column;
        const TilePosition position = {row, column, left >= kPanel ? ~0u : (1u << left) - 1,
                                       row + shift - column};
        const float* before = dots + (panel + 1) % 2 * kStep;
        uint16_t* gradient = memory.gradient.data + (panel - 1) * kStep;
        int64_t next = panel ? 0 : rows;
        const auto consume = [&](int64_t last) {
          for (; next < last; ++next)
            consumer.row(position, next, before + next * kPanel, gradient + next * kPanel);
        };
        if (panel < column_panels)
          multiply(query_panel, across + panel * steps * kStep, steps, dots + panel % 2 * kStep,
                   false, [&](int64_t) { consume(std::min(next + rows_a_step, rows)); });
        consume(rows);
        if (TileConsumer::kWithGradient && panel && rows < kPanel)
          std::fill(gradient + rows * kPanel, gradient + kStep, uint16_t{0});
      }
      consumer.end_panel(row, rows);
      if (!TileConsumer::kWithGradient) continue;
      float* result = memory.result.data + (row - begin) * padded(query.width);
      for (int64_t k = 0; k < steps; ++k)
        multiply(memory.gradient.data, memory.pairs.data + k * column_panels * kStep, column_panels,
                 result + k * kStep, block > from, [](int64_t) {});
    }
    consumer.end_block();
  }
}

// Calls task(number, memory) for each number below `count`. A thread uses the same memory for all
// of its tasks.
template <typename Task>
void with_memory(int64_t count, int threads, int64_t query_rows, int64_t key_rows, int64_t width,
                 bool with_gradient, const Task& task) {
  std::atomic<int64_t> next{0};
  parallel(std::min<int64_t>(count, threads), threads, [&](int64_t) {
    const AmxSession unit;
    const TileMemory memory(query_rows, key_rows, width, with_gradient);
    for (int64_t number; (number = next.fetch_add(1)) < count;) task(number, memory);
  });
}

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
