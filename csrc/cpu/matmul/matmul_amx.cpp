// The products of linear layers on the matrix unit of x86 (AMX).
//
// The right operand is packed once. A task owns a block of the result and goes through the depth in
// blocks. The sums of the task stay in L2 beside a block of the right operand. It reads rows of the
// left operand in place. If that operand is transposed, the task first packs its rows of a block of
// the depth. While the matrix unit computes 32 x 32 elements, the vector units round the previous
// ones, and the operands of the next product are prefetched.
#define BCLIP_ISA amx
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd/target.h"
#include "csrc/matmul.h"

#ifdef BCLIP_ISA_AVAILABLE

#include "csrc/cpu/simd/amx.h"

namespace bclip::cpu {

namespace amx {

namespace {

// The longest depth that is one block, so that no sums go to memory in between.
constexpr int64_t kWholeSteps = 24;
// The block of a longer depth. Its 32 rows of the left operand are 32 KiB and stay in L1.
constexpr int64_t kBlockSteps = 16;

// The largest task, in panels. Each row of tasks reads the whole right operand from L3, so tasks
// are tall. With a transposed left operand each column of tasks packs it again, so tasks are wider.
struct Shape {
  int64_t tall, wide;
};
constexpr Shape kShape = {12, 16}, kTransposedShape = {8, 24};

// The size of one part, if `size` is divided into the fewest equal parts of at most `most`.
int64_t even_share(int64_t size, int64_t most) {
  const int64_t parts = std::max<int64_t>((size + most - 1) / most, 1);
  return std::max<int64_t>((size + parts - 1) / parts, 1);
}

constexpr int64_t kAhead = 2;  // blocks between prefetching and packing

// Packs the right operand into [columns / 32][depth / 32] blocks.
template <typename AnyFeatures>
void pack_right(const AnyFeatures& right, const LinearProduct& product, int threads) {
  const int64_t steps = panels_of(product.depth), column_panels = panels_of(product.columns);
  // A task takes rows of the source, which are contiguous.
  parallel(product.right_transposed ? column_panels : steps, threads, [&](int64_t task) {
    const int64_t row = task * kPanel, count = product.right_transposed ? steps : column_panels;
    for (int64_t other = 0; other < count; ++other) {
      right.fetch(row, (other + kAhead) * kPanel);
      if (product.right_transposed)
        pack_across_step(right, row, other * kPanel,
                         product.workspace + (task * steps + other) * kStep);
      else
        pack_pairs_step(right, row, other * kPanel,
                        product.workspace + (other * steps + task) * kStep);
    }
  });
}

// Packs [2][16 rows][32 k] of the left operand from 32 rows k and 32 columns of its transpose. Adds
// the columns to the sums.
BCLIP_INLINE void pack_transposed_step(const Features& left, int64_t k, int64_t row,
                                       uint16_t* packed, bool with_sums, __m512& low_sum,
                                       __m512& high_sum) {
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

// Packs `count` steps of 32 rows of the left operand from `step` on. Adds the rows to `sums` (32,),
// unless it is null.
void pack_left(const LinearProduct& product, int64_t row, int64_t step, int64_t count,
               uint16_t* packed, float* sums) {
  __m512 low = _mm512_setzero_ps(), high = low;
  for (const int64_t end = step + count; step < end; ++step, packed += kStep) {
    if (product.left_transposed) {
      const Features left = {product.left, product.depth, product.rows};
      left.fetch((step + kAhead) * kPanel, row);
      pack_transposed_step(left, step * kPanel, row, packed, sums != nullptr, low, high);
    } else {
      const Features left = {product.left, product.rows, product.depth};
      for (int64_t i = 0; i < kPanel; ++i)
        _mm512_store_si512(packed + i * kPanel, left.load(row + i, step * kPanel));
    }
  }
  if (!sums) return;
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), low));
  _mm512_storeu_ps(sums + kHalf, _mm512_add_ps(_mm512_loadu_ps(sums + kHalf), high));
}

// Writes 32 x 32 sums plus the bias to the result, one row per call.
struct Finisher {
  explicit Finisher(const LinearProduct& of) : product(of) {
    const auto place = reinterpret_cast<uintptr_t>(of.result);
    whole_lines = of.columns % kPanel == 0 && place % 64 == 0;
  }

  const LinearProduct& product;
  bool whole_lines;  // rows are whole cache lines, so streaming stores bypass the caches
  const float* sums = nullptr;
  int64_t row = 0, end = 0, column = 0;
  __mmask32 present = 0;
  __m512 bias[2] = {};

  void start(const float* from, int64_t panel, int64_t column_panel) {
    sums = from, row = panel * kPanel, end = std::min(row + kPanel, product.rows),
    column = column_panel * kPanel;
    present = Features{nullptr, 0, product.columns}.columns(column);
    if (!product.bias) return;
    bias[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present), product.bias + column);
    bias[1] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present >> kHalf),
                                    product.bias + column + kHalf);
  }

  bool done() const { return row == end; }

  void complete() {
    while (!done()) (*this)();
  }

  BCLIP_MEMBER_INLINE void operator()() {
    const int64_t place = row++ * product.columns + column;
    const __m512 first = _mm512_add_ps(_mm512_load_ps(sums), bias[0]);
    const __m512 second = _mm512_add_ps(_mm512_load_ps(sums + kHalf), bias[1]);
    sums += kPanel;
    if (product.result_in_single) {
      float* const to = static_cast<float*>(product.result) + place;
      if (whole_lines) {
        _mm512_stream_ps(to, first);
        _mm512_stream_ps(to + kHalf, second);
      } else {
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>(present), first);
        _mm512_mask_storeu_ps(to + kHalf, static_cast<__mmask16>(present >> kHalf), second);
      }
    } else {
      uint16_t* const to = static_cast<uint16_t*>(product.result) + place;
      const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      if (whole_lines)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), rounded);
      else
        _mm512_mask_storeu_epi16(to, present, rounded);
    }
  }
};

// The memory of a thread, large enough for any product: packed steps of the left operand, and
// blocks of 32 x 32 sums. Threads keep it, because Linux needs more time to map the pages than a
// small product takes.
struct Memory {
  const Scratch<uint16_t> left{kShape.tall * kWholeSteps * kStep};
  const Scratch<float> sums{kShape.tall * kShape.wide * kStep};
};
static_assert(kTransposedShape.tall <= kShape.tall && kBlockSteps <= kWholeSteps &&
              kTransposedShape.tall * kTransposedShape.wide <= kShape.tall * kShape.wide);

// The number of steps in a block of the depth.
int64_t block_steps(int64_t depth) {
  return even_share(panels_of(depth), panels_of(depth) <= kWholeSteps ? kWholeSteps : kBlockSteps);
}

// Computes row panels [begin, end) x column panels [from, to) of the result.
void multiply_block(const LinearProduct& product, int64_t begin, int64_t end, int64_t from,
                    int64_t to, const Memory& memory) {
  const int64_t steps = panels_of(product.depth), share = block_steps(product.depth),
                wide = to - from;
  float left_sums[kTransposedShape.tall][kPanel] = {};
  const bool sums_left = product.left_sums && from == 0;
  const auto packed = [&](int64_t panel) {
    return memory.left.data + (panel - begin) * share * kStep;
  };
  const auto lies_in_rows = [&](int64_t panel) {
    return !product.left_transposed && product.depth % kPanel == 0 &&
           (panel + 1) * kPanel <= product.rows;
  };
  Finisher finisher{product};
  int64_t unit = 0;
  for (int64_t block = 0; block < std::max<int64_t>(steps, 1); block += share) {
    const int64_t block_end = std::min(block + share, steps), count = block_end - block;
    const bool last = block_end == steps;
    const int64_t rows = count ? (kPanel + count - 1) / count : 0;  // rows to write after each step
    for (int64_t panel = begin; panel < end; ++panel)
      if (!lies_in_rows(panel))
        pack_left(product, panel * kPanel, block, count, packed(panel),
                  sums_left ? left_sums[panel - begin] : nullptr);
    for (int64_t panel = begin; panel < end; ++panel) {
      const auto source = [&](int64_t row, int64_t step) {
        return product.left + (panel * kPanel + row) * product.depth + (block + step) * kPanel;
      };
      const Rows left =
          lies_in_rows(panel) ? Rows(source(0, 0), product.depth) : Rows(packed(panel));
      const bool fetches = panel + 1 < end && lies_in_rows(panel + 1);
      for (int64_t other = from; other < to; ++other, ++unit) {
        float* const sums =
            memory.sums.data +
            (share < steps ? (panel - begin) * wide + other - from : unit % 2) * kStep;
        const uint16_t* const right = product.workspace + (other * steps + block) * kStep;
        multiply(left, right, count, sums, block > 0, [&](int64_t step) {
          if (panel == begin) {  // later panels find it in L2
            const char* const ahead = reinterpret_cast<const char*>(right + (steps + step) * kStep);
            for (int64_t i = 0; i < kPanel; ++i) _mm_prefetch(ahead + 64 * i, _MM_HINT_T1);
          }
          if (fetches) {
            // There are wide * count moments. Each prefetches its share of count * 32 cache lines.
            const int64_t moment = (other - from) * count + step;
            for (int64_t i = moment * kPanel / wide; i < (moment + 1) * kPanel / wide; ++i)
              _mm_prefetch(reinterpret_cast<const char*>(source(kPanel + i % kPanel, i / kPanel)),
                           _MM_HINT_T1);
          }
          for (int64_t i = 0; i < rows && !finisher.done(); ++i) finisher();
        });
        finisher.complete();
        if (last) finisher.start(sums, panel, other);
      }
    }
  }
  finisher.complete();
  if (sums_left)
    for (int64_t panel = begin; panel < end; ++panel)
      std::copy_n(left_sums[panel - begin], std::min(kPanel, product.rows - panel * kPanel),
                  product.left_sums + panel * kPanel);
}

}  // namespace

}  // namespace amx

using namespace amx;

int64_t linear_workspace(int64_t columns, int64_t depth) { return padded(columns) * padded(depth); }

void linear(const LinearProduct& product, int threads) {
  if (!has_amx())
    throw std::invalid_argument("linear: this machine has no AMX, or Linux denies it");
  if (product.rows < 0 || product.columns < 0 || product.depth < 0)
    throw std::invalid_argument("linear: a product has negative sizes");
  if (product.left_sums && !product.left_transposed)
    throw std::invalid_argument("linear: left_sums needs a transposed left operand");
  if (reinterpret_cast<uintptr_t>(product.workspace) % 64)
    throw std::invalid_argument("linear: the workspace isn't aligned to 64 bytes");
  const int64_t count = product.right_transposed ? product.columns : product.depth;
  const int64_t width = product.right_transposed ? product.depth : product.columns;
  if (product.right_in_single)
    pack_right(SingleFeatures{static_cast<const float*>(product.right), count, width}, product,
               threads);
  else
    pack_right(Features{static_cast<const uint16_t*>(product.right), count, width}, product,
               threads);
  const int64_t row_panels = panels_of(product.rows), column_panels = panels_of(product.columns);
  const Shape most = product.left_transposed ? kTransposedShape : kShape;
  const int64_t wide = even_share(column_panels, most.wide),
                num_columns = (column_panels + wide - 1) / wide;
  // At least two tasks for each thread, if there are enough rows.
  const int64_t fair = row_panels * num_columns / (2 * std::max(threads, 1));
  const int64_t tall = even_share(row_panels, std::clamp<int64_t>(fair, 1, most.tall));
  const int64_t num_rows = (row_panels + tall - 1) / tall;
  std::atomic<int64_t> next{0};
  parallel(std::min<int64_t>(num_rows * num_columns, threads), threads, [&](int64_t) {
    const AmxSession unit;
    thread_local const Memory memory;
    for (int64_t task; (task = next.fetch_add(1)) < num_rows * num_columns;) {
      const int64_t row = task % num_rows * tall, column = task / num_rows * wide;
      multiply_block(product, row, std::min(row + tall, row_panels), column,
                     std::min(column + wide, column_panels), memory);
    }
    _mm_sfence();  // makes the streaming stores visible to other threads
  });
}

}  // namespace bclip::cpu

#else

namespace bclip::cpu {

int64_t linear_workspace(int64_t, int64_t) {
  throw std::invalid_argument("linear: built without AMX");
}

void linear(const LinearProduct&, int) { throw std::invalid_argument("linear: built without AMX"); }

}  // namespace bclip::cpu

#endif
