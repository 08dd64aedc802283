// All dot products of two sets of features on the matrix unit of x86 (AMX), 32 x 32 at a time, while the vector units work
// on the 32 x 32 before. Included as amx.h is.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "csrc/cpu/simd/amx.h"
#include "csrc/cpu/parallel.h"

namespace bclip::cpu {

namespace {

constexpr int64_t kBlockElements = 512 * 512;  // of K at a time: its two layouts are 1 MiB and stay in L2
constexpr int64_t kOwnRows = 1024;             // over which the packing of a block is spread

[[maybe_unused]] int64_t tasks_of(int64_t rows) { return (rows + kOwnRows - 1) / kOwnRows; }

// Rows of K at a time.
int64_t block_rows(int64_t width, int64_t count) {
  return std::min(padded(count), std::max<int64_t>(kPanel, kBlockElements / padded(width) / kPanel * kPanel));
}

// 32 x 32 dot products of the own rows from `row` on with the other rows from `column` on.
struct Place {
  int64_t row, column;
  uint32_t columns;  // which of the other rows there are
  int64_t lane;      // own row i's positive is on lane + i, where that is one of the 32
};

// 16 of the bits of a mask for 32 columns.
BCLIP_INLINE __mmask16 half_of(uint32_t mask, int64_t half) { return static_cast<__mmask16>(mask >> (half * kHalf)); }

// A thread's memory for `sweep`.
struct SweepMemory {
  SweepMemory(int64_t own_rows, int64_t other_rows, int64_t width, bool with_gradient)
      : block(block_rows(width, other_rows)),
        dots(2 * kStep),
        own(padded(own_rows) * padded(width)),
        across(block * padded(width)),
        pairs(with_gradient ? block * padded(width) : 0),
        gradient(with_gradient ? kPanel * block : 0),
        result(with_gradient ? padded(own_rows) * padded(width) : 0) {}

  const int64_t block;  // rows of K at a time
  const Scratch<float> dots;
  const Scratch<uint16_t> own, across, pairs, gradient;
  const Scratch<float> result;  // O: [own rows / 32][D / 32][32 rows][32 columns]
};

// What becomes of the dot products. `sweep` calls begin_block for other rows; within, for each panel of own rows,
// begin_panel, row for each (with G also for those beyond the last), end_panel; and end_block.
//
// Own rows [begin, end) against other rows [from, to). The positive of own row q is the other row q + shift.
template <typename Use>
void sweep(const Features& own, int64_t begin, int64_t end, const Features& other, int64_t from, int64_t to,
           int64_t shift, const SweepMemory& memory, Use& use) {
  const int64_t steps = panels(own.width);
  const int64_t rows_a_step = (kPanel + steps - 1) / steps;
  float* const dots = memory.dots.data;
  const uint16_t* const across = memory.across.data;
  for (int64_t row = begin; row < end; row += kPanel)
    pack_rows(own, row, memory.own.data + (row - begin) * padded(own.width));
  for (int64_t block = from; block < to; block += memory.block) {
    const int64_t count = std::min(memory.block, to - block), column_panels = panels(count);
    pack_across(other, block, count, memory.across.data);
    if (Use::kWithGradient) pack_pairs(other, block, count, memory.pairs.data);
    use.begin_block(block, count);
    for (int64_t row = begin; row < end; row += kPanel) {
      const int64_t rows = std::min(kPanel, end - row);
      const uint16_t* own_panel = memory.own.data + (row - begin) * padded(own.width);
      use.begin_panel();
      for (int64_t panel = 0; panel <= column_panels; ++panel) {
        // The panel before, row by row between the steps of this one.
        const int64_t column = block + (panel - 1) * kPanel, left = block + count - column;
        const Place place = {row, column, left >= kPanel ? ~0u : (1u << left) - 1, row + shift - column};
        const float* before = dots + (panel + 1) % 2 * kStep;
        uint16_t* gradient = memory.gradient.data + (panel - 1) * kStep;
        int64_t next = panel ? 0 : rows;
        const auto consume = [&](int64_t last) {
          for (; next < last; ++next) use.row(place, next, before + next * kPanel, gradient + next * kPanel);
        };
        if (panel < column_panels)
          multiply(own_panel, across + panel * steps * kStep, steps, dots + panel % 2 * kStep, false,
                   [&](int64_t) { consume(std::min(next + rows_a_step, rows)); });
        consume(rows);
        if (Use::kWithGradient && panel && rows < kPanel)
          std::fill(gradient + rows * kPanel, gradient + kStep, uint16_t{0});
      }
      use.end_panel(row, rows);
      if (!Use::kWithGradient) continue;
      float* result = memory.result.data + (row - begin) * padded(own.width);
      for (int64_t k = 0; k < steps; ++k)
        multiply(memory.gradient.data, memory.pairs.data + k * column_panels * kStep, column_panels,
                 result + k * kStep, block > from, [](int64_t) {});
    }
    use.end_block();
  }
}

// Runs task(number, memory) for each of `count`; a thread has one memory for all that it runs.
template <typename Task>
void with_memory(int64_t count, int threads, int64_t own_rows, int64_t other_rows, int64_t width, bool with_gradient,
                 const Task& task) {
  std::atomic<int64_t> next{0};
  parallel(std::min<int64_t>(count, threads), threads, [&](int64_t) {
    const Unit unit;
    const SweepMemory memory(own_rows, other_rows, width, with_gradient);
    for (int64_t number; (number = next.fetch_add(1)) < count;) task(number, memory);
  });
}

}  // namespace

}  // namespace bclip::cpu
