// bfloat16 features on the matrix unit of x86 (AMX). Two passes of the same shape, each of which owns its results:
//
//   own features Q (rows of the images, or texts), panel by panel of 32, against the others K, block by block:
//     X = Q K^T, 32 x 32 dot products at a time; what is to be done with the 32 x 32 before is interleaved with it, as
//     the matrix unit leaves the vector units idle;
//     in the backward, G = g(X) is rounded to bfloat16 and O += G K while it is in L1.
//
// S is computed once forward and twice backward: a quarter more multiplications than the least, a third for the sigmoid.
// In return nothing is accumulated outside a core's caches, memory beyond the results is 4 MiB a thread, each number is
// summed in one order whatever the number of threads, and a block of K is packed in both layouts, for X and for O, once
// per kOwnRows rows.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "csrc/contrastive.h"
#include "csrc/cpu/contrastive/contrastive_kernels.h"
#include "csrc/cpu/parallel.h"

#if defined(BCLIP_X86_TARGETS) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics start from an undefined vector
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")

#define BCLIP_AVX512 1
#include "csrc/cpu/simd/amx_sweep.h"

namespace bclip::cpu {

namespace {

constexpr int64_t kColumnsAtOnce = 2048;       // at least, of a task of the forward, which owns a row and a column range
constexpr int64_t kMostRanges = 32;            // of each: so many sums are kept of a row or column
constexpr int64_t kRowsInSingle = 256;         // single precision sums columns over so many rows

struct Factor16 {
  explicit Factor16(double value)
      : high(_mm512_set1_ps(static_cast<float>(value))),
        low(_mm512_set1_ps(static_cast<float>(value - static_cast<double>(static_cast<float>(value))))) {}

  __m512 high, low;
};

// 2^(x * factor - offset) for a whole-numbered offset, as exp2_affine of lanes.h, by instructions that only AVX-512 has.
BCLIP_INLINE __m512 exp2_of(__m512 x, const Factor16& factor, __m512 offset) {
  const __m512 y = _mm512_fmsub_ps(x, factor.high, offset);
  const __m512 rest = _mm512_reduce_ps(y, 8);  // y minus the nearest whole number
  const __m512 f = _mm512_fmadd_ps(x, factor.low, rest);
  __m512 power = _mm512_set1_ps(0.0013274068478494883f);  // relative error 1.5e-7
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.009671497158706188f));
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.055507007986307144f));
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.24022242426872253f));
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.6931470036506653f));
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(power, _mm512_sub_ps(y, rest));
}

// The positive's lane where row i has it here, else -1.
BCLIP_INLINE int64_t positive_lane(const Place& place, int64_t i) {
  const int64_t lane = place.lane + i;
  return static_cast<uint64_t>(lane) < static_cast<uint64_t>(kPanel) ? lane : -1;
}

BCLIP_INLINE void store_rounded(__m512 first, __m512 second, uint16_t* to) {
  _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// The groups' ids and shares, seen from the own rows.
struct OwnGroups {
  OwnGroups(const Groups& groups, bool own_is_image)
      : own(own_is_image ? groups.rows : groups.columns),
        other(own_is_image ? groups.columns : groups.rows),
        own_shares(own_is_image ? groups.row_shares : groups.column_shares),
        other_shares(own_is_image ? groups.column_shares : groups.row_shares) {}

  const int32_t *const own, *const other;
  const float *const own_shares, *const other_shares;
};

class ExponentialSums {
 public:
  static constexpr bool kWithGradient = false;

  // Adds to rows (all own rows) and columns (all other rows).
  ExponentialSums(double factor, float offset, double* rows, double* columns)
      : factor_(factor), offset_(_mm512_set1_ps(offset)), rows_(rows), columns_(columns) {}

  void begin_block(int64_t column, int64_t count) {
    column_ = column;
    count_ = count;
    partial_.assign(padded(count), 0.f);
  }
  void begin_panel() { std::fill_n(&row_sums_[0][0], kPanel * kHalf, 0.f); }

  inline __attribute__((always_inline)) void row(const Place& place, int64_t i, const float* dots, uint16_t*) {
    uint32_t counted = place.columns;
    const int64_t positive = positive_lane(place, i);
    if (positive >= 0) counted &= ~(1u << positive);
    float* columns = partial_.data() + (place.column - column_);
    __m512 row_sum = _mm512_load_ps(row_sums_[i]);
    for (int64_t half = 0; half < kPanel; half += kHalf) {
      const __m512 e = exp2_of(_mm512_load_ps(dots + half), factor_, offset_);
      const __m512 kept = _mm512_maskz_mov_ps(static_cast<__mmask16>(counted >> half), e);
      row_sum = _mm512_add_ps(row_sum, kept);
      _mm512_storeu_ps(columns + half, _mm512_add_ps(_mm512_loadu_ps(columns + half), kept));
    }
    _mm512_store_ps(row_sums_[i], row_sum);
  }

  void end_panel(int64_t row, int64_t count) {
    for (int64_t i = 0; i < count; ++i) rows_[row + i] += _mm512_reduce_add_ps(_mm512_load_ps(row_sums_[i]));
    if ((row + kPanel) % kRowsInSingle == 0) add_columns();
  }
  void end_block() { add_columns(); }

 private:
  void add_columns() {
    for (int64_t i = 0; i < count_; ++i) columns_[column_ + i] += partial_[i];
    std::fill(partial_.begin(), partial_.end(), 0.f);
  }

  const Factor16 factor_;
  const __m512 offset_;
  double *const rows_, *const columns_;
  alignas(64) float row_sums_[kPanel][kHalf];
  std::vector<float> partial_;
  int64_t column_ = 0, count_ = 0;
};

// Of the 16 columns from `column` on, those in the group of the own row.
BCLIP_INLINE __mmask16 same_group(const OwnGroups& groups, int64_t row, int64_t column, __mmask16 present) {
  const __m512i ids = _mm512_maskz_loadu_epi32(present, groups.other + column);
  return _mm512_mask_cmpeq_epi32_mask(present, ids, _mm512_set1_epi32(groups.own[row]));
}

template <bool kOneOffset, bool kGroups>
class SoftmaxGradient {
 public:
  static constexpr bool kWithGradient = true;

  SoftmaxGradient(const GradientTile& all, bool own_is_image)
      : factor_(all.factor),
        own_(own_is_image ? all.rows : all.columns),
        other_(own_is_image ? all.columns : all.rows),
        positive_grad_(all.positive_grad),
        own_is_image_(own_is_image),
        groups_(all.groups, own_is_image) {}

  void begin_block(int64_t, int64_t) {}
  void begin_panel() { products_ = _mm512_setzero_ps(); }

  inline __attribute__((always_inline)) void row(const Place& place, int64_t i, const float* dots, uint16_t* gradient) {
    const int64_t row = place.row + i;
    const __m512 offset = _mm512_set1_ps(own_.offsets[row]), share = _mm512_set1_ps(own_.shares[row]);
    __m512 g[2];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = place.column + half * kHalf;
      const __mmask16 present = half_of(place.columns, half);
      const __m512 x = _mm512_load_ps(dots + half * kHalf);
      const __m512 e = exp2_of(x, factor_, offset);
      const __m512 other_share = _mm512_maskz_loadu_ps(present, other_.shares + column);
      if (kOneOffset) {
        g[half] = _mm512_maskz_mul_ps(present, e, _mm512_add_ps(share, other_share));
      } else {
        const __m512 other_offset = _mm512_maskz_loadu_ps(present, other_.offsets + column);
        const __m512 others = _mm512_mul_ps(exp2_of(x, factor_, other_offset), other_share);
        g[half] = _mm512_maskz_fmadd_ps(present, e, share, others);
      }
      if (kGroups) {
        const __mmask16 same = same_group(groups_, row, column, present);
        const __m512 target = _mm512_add_ps(_mm512_set1_ps(groups_.own_shares[row]),
                                            _mm512_maskz_loadu_ps(present, groups_.other_shares + column));
        g[half] = _mm512_mask_sub_ps(g[half], same, g[half], target);
      }
    }
    const int64_t lane = positive_lane(place, i);
    if (lane >= 0 && place.columns >> lane & 1) {
      const __m512 own = _mm512_set1_ps(positive_grad_[own_is_image_ ? row : place.column + lane]);
      for (int64_t half = 0; half < 2; ++half) g[half] = _mm512_mask_mov_ps(g[half], half_of(1u << lane, half), own);
    }
    for (int64_t half = 0; half < 2; ++half)
      products_ = _mm512_fmadd_ps(g[half], _mm512_load_ps(dots + half * kHalf), products_);
    store_rounded(g[0], g[1], gradient);
  }

  void end_panel(int64_t, int64_t) { product += _mm512_reduce_add_ps(products_); }
  void end_block() {}

  double product = 0;  // sum of G X, before G is rounded

 private:
  __m512 products_;
  const Factor16 factor_;
  const Shares own_, other_;
  const float* const positive_grad_;  // by image
  const bool own_is_image_;
  const OwnGroups groups_;
};

template <bool kGradient, bool kGroups>
class SigmoidGradient {
 public:
  static constexpr bool kWithGradient = kGradient;

  SigmoidGradient(const SigmoidTile& all, bool own_is_image)
      : all_(all), minus_log2_e_(-1.4426950408889634), groups_(all.groups, own_is_image) {}

  void begin_block(int64_t, int64_t) {}
  void begin_panel() { losses_ = gradients_ = products_ = _mm512_setzero_ps(); }

  inline __attribute__((always_inline)) void row(const Place& place, int64_t i, const float* dots, uint16_t* gradient) {
    const int64_t lane = positive_lane(place, i);
    const uint32_t positives = lane < 0 ? 0 : 1u << lane;
    const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.f), minus_zero = _mm512_set1_ps(-0.f);
    __m512 g[2];
    for (int64_t half = 0; half < 2; ++half) {
      const __mmask16 present = half_of(place.columns, half);
      const __mmask16 positive = kGroups ? same_group(groups_, place.row + i, place.column + half * kHalf, present)
                                         : half_of(positives, half);
      const __m512 x = _mm512_load_ps(dots + half * kHalf);
      __m512 z = _mm512_fmadd_ps(x, _mm512_set1_ps(all_.scale), _mm512_set1_ps(all_.bias));
      z = _mm512_mask_xor_ps(z, positive, z, minus_zero);  // -y S: minus S at the positives
      const __m512 u = exp2_of(_mm512_abs_ps(z), minus_log2_e_, zero);
      // With NaN in the second place, max gives NaN.
      const __m512 loss = _mm512_add_ps(_mm512_max_ps(zero, z), (__m512)log1p_unit((Lanes)u));
      losses_ = _mm512_mask_add_ps(losses_, present, losses_, loss);
      if (!kGradient) continue;
      const __m512 numerator = _mm512_mask_mov_ps(u, _mm512_cmp_ps_mask(z, zero, _CMP_GT_OQ), one);
      const __m512 size = _mm512_maskz_div_ps(present, _mm512_mul_ps(numerator, _mm512_set1_ps(all_.weight)),
                                              _mm512_add_ps(u, one));
      g[half] = _mm512_mask_xor_ps(size, positive, size, minus_zero);
      gradients_ = _mm512_add_ps(gradients_, g[half]);
      products_ = _mm512_fmadd_ps(g[half], x, products_);
    }
    if (kGradient) store_rounded(g[0], g[1], gradient);
  }

  void end_panel(int64_t, int64_t) {
    sums.loss += _mm512_reduce_add_ps(losses_);
    sums.gradient += _mm512_reduce_add_ps(gradients_);
    sums.product += _mm512_reduce_add_ps(products_);
  }
  void end_block() {}

  SigmoidSums sums = {};

 private:
  const SigmoidTile all_;
  const Factor16 minus_log2_e_;
  const OwnGroups groups_;
  __m512 losses_, gradients_, products_;
};

// Writes scale * O to the rows of `gradient` (all own rows, D).
void finish(const Features& own, int64_t begin, int64_t end, const float* result, double scale, void* gradient,
            bool in_single) {
  const __m512 factor = _mm512_set1_ps(static_cast<float>(scale));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t panel = (row - begin) / kPanel, i = (row - begin) % kPanel;
    for (int64_t k = 0; k < own.width; k += kPanel) {
      const float* from = result + panel * kPanel * padded(own.width) + k * kPanel + i * kPanel;
      const __m512 first = _mm512_mul_ps(_mm512_load_ps(from), factor);
      const __m512 second = _mm512_mul_ps(_mm512_load_ps(from + kHalf), factor);
      const __mmask32 present = own.columns(k);
      const int64_t place = row * own.width + k;
      if (in_single) {
        float* to = static_cast<float*>(gradient) + place;
        _mm512_mask_storeu_ps(to, half_of(present, 0), first);
        _mm512_mask_storeu_ps(to + kHalf, half_of(present, 1), second);
      } else {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        _mm512_mask_storeu_epi16(static_cast<uint16_t*>(gradient) + place, present, both);
      }
    }
  }
}

// Runs make_use() over kOwnRows own rows a task, and keep(number of the task, use).
template <typename MakeUse, typename Keep>
void gradient_of(const Features& own, const Features& other, int64_t shift, const AmxGradients& gradients,
                 void* gradient, int threads, const MakeUse& make_use, const Keep& keep) {
  const int64_t own_rows = std::min(kOwnRows, own.count);
  constexpr bool with_gradient = decltype(make_use())::kWithGradient;
  with_memory(tasks_of(own.count), threads, own_rows, other.count, own.width, with_gradient,
              [&](int64_t task, const SweepMemory& memory) {
                const int64_t begin = task * kOwnRows, end = std::min(begin + kOwnRows, own.count);
                auto use = make_use();
                sweep(own, begin, end, other, 0, other.count, shift, memory, use);
                if (with_gradient)
                  finish(own, begin, end, memory.result.data, gradients.scale, gradient, gradients.in_single);
                keep(task, use);
              });
}

bool ask_for_amx() {
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (amx_bf16 | amx_tile)) != (amx_bf16 | amx_tile)) return false;
  if (!__builtin_cpu_supports("avx512bf16") || instruction_set() != "avx512") return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

void check(const AmxProblem& problem) {
  if (!has_amx()) throw std::invalid_argument("contrastive: this machine has no AMX, or Linux denies it");
  if (problem.rows < 0 || problem.columns < 0 || problem.width < 0)
    throw std::invalid_argument("contrastive: a problem has negative sizes");
}

Features images_of(const AmxProblem& problem) { return {problem.image, problem.rows, problem.width}; }
Features texts_of(const AmxProblem& problem) { return {problem.text, problem.columns, problem.width}; }

}  // namespace

bool has_amx() {
  static const bool granted = ask_for_amx();
  return granted;
}

void amx_exponential_sums(const AmxProblem& problem, double factor, float offset, const Sums& sums, int threads) {
  check(problem);
  const Features images = images_of(problem), texts = texts_of(problem);
  // A task for each pair of a row and a column range, which adds to its own sums.
  const int64_t rows_a_task = std::max(kOwnRows, padded(images.count / kMostRanges));
  const int64_t row_ranges = (images.count + rows_a_task - 1) / rows_a_task;
  const int64_t columns_a_task = std::max(kColumnsAtOnce, padded(texts.count / kMostRanges));
  const int64_t column_ranges = (texts.count + columns_a_task - 1) / columns_a_task;
  std::vector<double> rows(column_ranges * images.count), columns(row_ranges * texts.count);
  with_memory(row_ranges * column_ranges, threads, rows_a_task, std::min(columns_a_task, texts.count), images.width,
              false, [&](int64_t task, const SweepMemory& memory) {
                const int64_t row_range = task / column_ranges, column_range = task % column_ranges;
                const int64_t begin = row_range * rows_a_task, from = column_range * columns_a_task;
                const int64_t end = std::min(begin + rows_a_task, images.count);
                const int64_t to = std::min(from + columns_a_task, texts.count);
                ExponentialSums use(factor, offset, rows.data() + column_range * images.count,
                                    columns.data() + row_range * texts.count);
                sweep(images, begin, end, texts, from, to, problem.first, memory, use);
              });
  for (int64_t row = 0; row < images.count; ++row) {
    double total = 0;
    for (int64_t range = 0; range < column_ranges; ++range) total += rows[range * images.count + row];
    sums.rows[row] = static_cast<float>(total);
  }
  for (int64_t range = 0; range < row_ranges; ++range)
    for (int64_t column = 0; column < texts.count; ++column)
      sums.columns[column] += columns[range * texts.count + column];
}

double amx_softmax_gradient(const AmxProblem& problem, const Softmax& softmax, const AmxGradients& gradients,
                            int threads) {
  check(problem);
  const Features images = images_of(problem), texts = texts_of(problem);
  const SoftmaxShares shares(softmax, problem.rows, problem.columns);
  const GradientTile all = shares.tile(0, 0);
  std::vector<double> products(tasks_of(problem.rows));
  const auto run = [&](auto one_offset, auto groups) {
    using Use = SoftmaxGradient<decltype(one_offset)::value, decltype(groups)::value>;
    gradient_of(images, texts, problem.first, gradients, gradients.image, threads, [&] { return Use(all, true); },
                [&](int64_t task, const Use& use) { products[task] = use.product; });
    gradient_of(texts, images, -problem.first, gradients, gradients.text, threads,
                [&] { return Use(all, false); }, [](int64_t, const Use&) {});
  };
  if (all.groups.rows)
    all.one_offset ? run(std::true_type(), std::true_type()) : run(std::false_type(), std::true_type());
  else
    all.one_offset ? run(std::true_type(), std::false_type()) : run(std::false_type(), std::false_type());
  return std::accumulate(products.begin(), products.end(), 0.0);
}

SigmoidSums amx_sigmoid_gradient(const AmxProblem& problem, const Sigmoid& sigmoid, const AmxGradients& gradients,
                                 int threads) {
  check(problem);
  const Features images = images_of(problem), texts = texts_of(problem);
  const SigmoidTile all(sigmoid);
  std::vector<SigmoidSums> partial(tasks_of(problem.rows));
  const auto run = [&](auto with_gradients, auto groups) {
    using Use = SigmoidGradient<decltype(with_gradients)::value, decltype(groups)::value>;
    gradient_of(images, texts, problem.first, gradients, gradients.image, threads, [&] { return Use(all, true); },
                [&](int64_t task, const Use& use) { partial[task] = use.sums; });
    if constexpr (Use::kWithGradient)
      gradient_of(texts, images, -problem.first, gradients, gradients.text, threads,
                  [&] { return Use(all, false); }, [](int64_t, const Use&) {});
  };
  if (all.groups.rows)
    sigmoid.with_gradients ? run(std::true_type(), std::true_type()) : run(std::false_type(), std::true_type());
  else
    sigmoid.with_gradients ? run(std::true_type(), std::false_type()) : run(std::false_type(), std::false_type());
  SigmoidSums total = {};
  for (const auto& part : partial) {
    total.loss += part.loss;
    total.gradient += part.gradient;
    total.product += part.product;
  }
  return total;
}

}  // namespace bclip::cpu

#else

namespace bclip::cpu {

namespace {

[[noreturn]] void refuse() { throw std::invalid_argument("contrastive: built without AMX"); }

}  // namespace

bool has_amx() { return false; }

void amx_exponential_sums(const AmxProblem&, double, float, const Sums&, int) { refuse(); }

double amx_softmax_gradient(const AmxProblem&, const Softmax&, const AmxGradients&, int) { refuse(); }

SigmoidSums amx_sigmoid_gradient(const AmxProblem&, const Sigmoid&, const AmxGradients&, int) { refuse(); }

}  // namespace bclip::cpu

#endif
