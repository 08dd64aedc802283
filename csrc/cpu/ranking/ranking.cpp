// Dot products that exceed a bound (ranking.h): nearly all are decided in bfloat16, the rest in
// double precision.
#define BCLIP_ISA amx
#include "csrc/ranking.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd/isa.h"

namespace bclip::cpu {

namespace {

constexpr int64_t kPairsATask = 4096;
constexpr int64_t kSums = 16;

#ifdef BCLIP_X86_TARGETS
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void dot_products_of(const float* left, const float* right, int64_t columns, int64_t width,
                     const int64_t* pairs, int64_t count, double* out) {
  for (int64_t p = 0; p < count; ++p) {
    const float *one = left + pairs[p] / columns * width, *two = right + pairs[p] % columns * width;
    double sums[kSums] = {};
    int64_t k = 0;
    for (; k + kSums <= width; k += kSums)
      for (int64_t lane = 0; lane < kSums; ++lane)
        sums[lane] += static_cast<double>(one[k + lane]) * static_cast<double>(two[k + lane]);
    double total = 0;
    for (; k < width; ++k) total += static_cast<double>(one[k]) * static_cast<double>(two[k]);
    for (const double sum : sums) total += sum;
    out[p] = total;
  }
}

}  // namespace

void dot_products(const float* left, const float* right, int64_t columns, int64_t width,
                  const int64_t* pairs, int64_t count, double* out, int threads) {
  if (columns < 0 || width < 0 || count < 0)
    throw std::invalid_argument("ranking: a problem has negative sizes");
  parallel((count + kPairsATask - 1) / kPairsATask, threads, [&](int64_t task) {
    const int64_t begin = task * kPairsATask, part = std::min(kPairsATask, count - begin);
    dot_products_of(left, right, columns, width, pairs + begin, part, out + begin);
  });
}

}  // namespace bclip::cpu

// The rest of this file is compiled for the matrix unit.
#include "csrc/cpu/simd/target.h"

#ifdef BCLIP_ISA_AVAILABLE

#include "csrc/cpu/simd/amx_tiles.h"

namespace bclip::cpu {

namespace amx {

namespace {

// Counts the dot products that are decided, and lists the undecided pairs.
class Deciding {
 public:
  static constexpr bool kWithGradient = false;

  Deciding(const Screen& all, int64_t most) : all_(all), most_(most), columns_(all.columns) {}

  void begin_block(int64_t, int64_t) {}
  void begin_panel() {}

  inline __attribute__((always_inline)) void row(const TilePosition& position, int64_t i,
                                                 const float* dots, uint16_t*) {
    const int64_t row = position.row + i;
    const __m512 low = _mm512_set1_ps(all_.row_low[row]), high = _mm512_set1_ps(all_.row_high[row]);
    uint32_t above = 0, open_row = 0, open_column = 0;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = position.column + half * kHalf;
      const __mmask16 present = half_of(position.columns, half);
      const __m512 x = _mm512_load_ps(dots + half * kHalf);
      const __m512 column_low = _mm512_maskz_loadu_ps(present, all_.column_low + column);
      const __m512 column_high = _mm512_maskz_loadu_ps(present, all_.column_high + column);
      const __mmask16 row_above = _mm512_mask_cmp_ps_mask(present, x, high, _CMP_GT_OQ);
      const __mmask16 column_above = _mm512_mask_cmp_ps_mask(present, x, column_high, _CMP_GT_OQ);
      const __mmask16 row_maybe = _mm512_mask_cmp_ps_mask(present, x, low, _CMP_GE_OQ);
      const __mmask16 column_maybe = _mm512_mask_cmp_ps_mask(present, x, column_low, _CMP_GE_OQ);
      if (column_above) {
        int32_t* counts = columns_.data() + column;
        const __m512i before = _mm512_maskz_loadu_epi32(column_above, counts);
        _mm512_mask_storeu_epi32(counts, column_above,
                                 _mm512_add_epi32(before, _mm512_set1_epi32(1)));
      }
      above |= static_cast<uint32_t>(row_above) << (half * kHalf);
      open_row |= static_cast<uint32_t>(row_maybe ^ row_above) << (half * kHalf);
      open_column |= static_cast<uint32_t>(column_maybe ^ column_above) << (half * kHalf);
    }
    if (above) all_.row_counts[row] += __builtin_popcount(above);
    if (open_row | open_column) list(row * all_.columns + position.column, open_row, open_column);
  }

  void end_panel(int64_t, int64_t) {}
  void end_block() {}

  const std::vector<int32_t>& columns() const { return columns_; }
  std::vector<int64_t> pairs;

 private:
  void list(int64_t pair, uint32_t open_row, uint32_t open_column) {
    if (static_cast<int64_t>(pairs.size()) > most_) return;
    for (uint32_t open = open_row | open_column; open; open &= open - 1) {
      const int lane = __builtin_ctz(open);
      pairs.push_back(4 * (pair + lane) + (open_row >> lane & 1) + 2 * (open_column >> lane & 1));
    }
  }

  const Screen all_;
  const int64_t most_;
  std::vector<int32_t> columns_;
};

}  // namespace

}  // namespace amx

using namespace amx;

std::vector<int64_t> amx_screen(const Screen& screen, int64_t most, int threads) {
  if (!has_amx())
    throw std::invalid_argument("ranking: this machine has no AMX, or Linux denies it");
  if (screen.rows < 0 || screen.columns < 0 || screen.width < 0)
    throw std::invalid_argument("ranking: a problem has negative sizes");
  const Features left = {screen.left, screen.rows, screen.width};
  const Features right = {screen.right, screen.columns, screen.width};
  std::vector<int64_t> pairs;
  std::mutex mutex;
  std::atomic<bool> enough{false};
  with_memory(tasks_of(left.count), threads, std::min(kQueryRows, left.count), right.count,
              left.width, false, [&](int64_t task, const TileMemory& memory) {
                if (enough) return;
                Deciding consumer(screen, most);
                const int64_t begin = task * kQueryRows,
                              end = std::min(begin + kQueryRows, left.count);
                for_each_tile(left, begin, end, right, 0, right.count, 0, memory, consumer);
                const std::lock_guard<std::mutex> lock(mutex);
                for (int64_t column = 0; column < right.count; ++column)
                  screen.column_counts[column] += consumer.columns()[column];
                pairs.insert(pairs.end(), consumer.pairs.begin(), consumer.pairs.end());
                if (static_cast<int64_t>(pairs.size()) > most) enough = true;
              });
  return pairs;
}

}  // namespace bclip::cpu

#else

namespace bclip::cpu {

std::vector<int64_t> amx_screen(const Screen&, int64_t, int) {
  throw std::invalid_argument("ranking: built without AMX");
}

}  // namespace bclip::cpu

#endif
