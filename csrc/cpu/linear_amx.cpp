// The products of linear layers on the matrix unit of x86 (AMX).
//
// The right operand is packed once, whole. A task then owns kTaskPanels x kBlockPanels panels of the result, whose sums
// stay in L2 beside a block of the right operand, while the depth passes by in blocks: so much of 32 rows of
// the left operand is packed at a time and stays in L1.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "../contrastive.h"
#include "../linear.h"
#include "contrastive_kernels.h"
#include "parallel.h"

#if defined(BCLIP_X86_TARGETS) && defined(__linux__)

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics start from an undefined vector
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")

#define BCLIP_AVX512 1
#include "amx.h"

namespace bclip::cpu {

namespace {

constexpr int64_t kWholeSteps = 24;   // a depth taken as one block: its sums never wait in memory
constexpr int64_t kBlockSteps = 16;   // of a longer one: 32 KiB of a panel of the left operand
constexpr int64_t kBlockPanels = 24;  // 768 KiB of the right operand
constexpr int64_t kTaskPanels = 8;    // 768 KiB of sums

// The smallest even share of `size` that is at most `most`.
int64_t even_share(int64_t size, int64_t most) {
  const int64_t parts = std::max<int64_t>((size + most - 1) / most, 1);
  return std::max<int64_t>((size + parts - 1) / parts, 1);
}

// [columns / 32][depth / 32] blocks.
template <typename AnyFeatures>
void pack_right(const AnyFeatures& right, const Product& product, int threads) {
  const int64_t steps = panels(product.depth), column_panels = panels(product.columns);
  // By rows of the source, which lie together.
  parallel(product.right_transposed ? column_panels : steps, threads, [&](int64_t task) {
    if (product.right_transposed)
      for (int64_t step = 0; step < steps; ++step)
        pack_across_step(right, task * kPanel, step * kPanel, product.workspace + (task * steps + step) * kStep);
    else
      for (int64_t panel = 0; panel < column_panels; ++panel)
        pack_pairs_step(right, task * kPanel, panel * kPanel, product.workspace + (panel * steps + task) * kStep);
  });
}

// The left operand's [2][16 rows][32 k] from 32 rows of its transposed, k, at 32 of their columns; adds these to sums.
BCLIP_INLINE void pack_transposed_step(const Features& left, int64_t k, int64_t row, uint16_t* packed, bool with_sums,
                                       __m512& low_sum, __m512& high_sum) {
  __m512i low[16], high[16];
  const auto sum_of = [](__m512i pairs) {
    const __m512i odd = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm512_add_ps((__m512)_mm512_slli_epi32(pairs, 16), (__m512)odd);
  };
  for (int64_t i = 0; i < kHalf; ++i) {
    const __m512i even = left.load(k + 2 * i, row), odd = left.load(k + 2 * i + 1, row);
    low[i] = interleave(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd));
    high[i] = interleave(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1));
    if (!with_sums) continue;
    low_sum = _mm512_add_ps(low_sum, sum_of(low[i]));
    high_sum = _mm512_add_ps(high_sum, sum_of(high[i]));
  }
  transpose(low);
  transpose(high);
  for (int64_t i = 0; i < kHalf; ++i) {
    _mm512_store_si512(packed + i * kPanel, low[i]);
    _mm512_store_si512(packed + kStep / 2 + i * kPanel, high[i]);
  }
}

// Steps [from, to) of 32 rows of the left operand; `sums` (32) are added to, or null.
void pack_left(const Product& product, int64_t row, int64_t from, int64_t to, uint16_t* packed, float* sums) {
  if (product.left_transposed) {
    const Features left = {product.left, product.depth, product.rows};
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t step = from; step < to; ++step, packed += kStep)
      pack_transposed_step(left, step * kPanel, row, packed, sums != nullptr, low, high);
    if (sums) {
      _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), low));
      _mm512_storeu_ps(sums + kHalf, _mm512_add_ps(_mm512_loadu_ps(sums + kHalf), high));
    }
  } else {
    const Features left = {product.left, product.rows, product.depth};
    for (int64_t step = from; step < to; ++step)
      for (int64_t i = 0; i < kPanel; ++i, packed += kPanel)
        _mm512_store_si512(packed, left.load(row + i, step * kPanel));
  }
}

// Writes a row panel's sums, with the bias, row by row as they lie in memory.
void finish(const Product& product, int64_t panel, int64_t from, int64_t to, const float* sums) {
  const int64_t begin = panel * kPanel, end = std::min(begin + kPanel, product.rows);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t other = from; other < to; ++other) {
      const int64_t column = other * kPanel, place = row * product.columns + column;
      const __mmask32 present = Features{nullptr, 0, product.columns}.columns(column);
      const __mmask16 low = static_cast<__mmask16>(present), high = static_cast<__mmask16>(present >> kHalf);
      const float* own = sums + (other - from) * kStep + (row - begin) * kPanel;
      __m512 first = _mm512_load_ps(own), second = _mm512_load_ps(own + kHalf);
      if (product.bias) {
        first = _mm512_add_ps(first, _mm512_maskz_loadu_ps(low, product.bias + column));
        second = _mm512_add_ps(second, _mm512_maskz_loadu_ps(high, product.bias + column + kHalf));
      }
      if (product.result_in_single) {
        _mm512_mask_storeu_ps(static_cast<float*>(product.result) + place, low, first);
        _mm512_mask_storeu_ps(static_cast<float*>(product.result) + place + kHalf, high, second);
      } else {
        _mm512_mask_storeu_epi16(static_cast<uint16_t*>(product.result) + place, present,
                                 (__m512i)_mm512_cvtne2ps_pbh(second, first));
      }
    }
}

struct Memory {
  const Scratch<uint16_t> left{kWholeSteps * kStep};
  const Scratch<float> sums{kTaskPanels * kBlockPanels * kStep};
};

// Row panels [begin, end) x column panels [from, to).
void multiply_block(const Product& product, int64_t begin, int64_t end, int64_t from, int64_t to,
                    const Memory& memory) {
  const int64_t steps = panels(product.depth);
  const int64_t share = even_share(steps, steps <= kWholeSteps ? kWholeSteps : kBlockSteps);
  float left_sums[kTaskPanels][kPanel] = {};
  const bool sums_left = product.left_sums && from == 0;
  for (int64_t block = 0; block < std::max<int64_t>(steps, 1); block += share) {
    const int64_t block_end = std::min(block + share, steps);
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_left(product, panel * kPanel, block, block_end, memory.left.data,
                sums_left ? left_sums[panel - begin] : nullptr);
      float* const sums = memory.sums.data + (share < steps ? (panel - begin) * (to - from) * kStep : 0);
      for (int64_t other = from; other < to; ++other)
        multiply(memory.left.data, product.workspace + (other * steps + block) * kStep, block_end - block,
                 sums + (other - from) * kStep, block > 0, [](int64_t) {});
      if (block_end == steps) finish(product, panel, from, to, sums);
    }
  }
  if (sums_left)
    for (int64_t panel = begin; panel < end; ++panel)
      std::copy_n(left_sums[panel - begin], std::min(kPanel, product.rows - panel * kPanel),
                  product.left_sums + panel * kPanel);
}

}  // namespace

int64_t product_workspace(int64_t columns, int64_t depth) { return padded(columns) * padded(depth); }

void amx_product(const Product& product, int threads) {
  if (!has_amx()) throw std::invalid_argument("linear: this machine has no AMX, or Linux denies it");
  if (product.rows < 0 || product.columns < 0 || product.depth < 0)
    throw std::invalid_argument("linear: a product has negative sizes");
  if (reinterpret_cast<uintptr_t>(product.workspace) % 64)
    throw std::invalid_argument("linear: the workspace isn't aligned to 64 bytes");
  const int64_t count = product.right_transposed ? product.columns : product.depth;
  const int64_t width = product.right_transposed ? product.depth : product.columns;
  if (product.right_in_single)
    pack_right(SingleFeatures{static_cast<const float*>(product.right), count, width}, product, threads);
  else
    pack_right(Features{static_cast<const uint16_t*>(product.right), count, width}, product, threads);
  const int64_t row_panels = panels(product.rows), column_panels = panels(product.columns);
  const int64_t tall = even_share(row_panels, kTaskPanels), wide = even_share(column_panels, kBlockPanels);
  const int64_t num_rows = (row_panels + tall - 1) / tall, num_columns = (column_panels + wide - 1) / wide;
  std::atomic<int64_t> next{0};
  parallel(std::min<int64_t>(num_rows * num_columns, threads), threads, [&](int64_t) {
    const Unit unit;
    const Memory memory;
    for (int64_t task; (task = next.fetch_add(1)) < num_rows * num_columns;) {
      const int64_t row = task % num_rows * tall, column = task / num_rows * wide;
      multiply_block(product, row, std::min(row + tall, row_panels), column, std::min(column + wide, column_panels),
                     memory);
    }
  });
}

}  // namespace bclip::cpu

#else

namespace bclip::cpu {

int64_t product_workspace(int64_t, int64_t) { throw std::invalid_argument("linear: built without AMX"); }

void amx_product(const Product&, int) { throw std::invalid_argument("linear: built without AMX"); }

}  // namespace bclip::cpu

#endif
