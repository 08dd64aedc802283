// The contrastive operators for bfloat16 features on the matrix unit of x86 (AMX). A task owns its
// results:
//
//   It multiplies its rows Q of one set of features (images, or texts), panel by panel of 32, with
//   the other set K, block by block: X = Q K^T, 32 x 32 dot products at a time. Work on the
//   previous 32 x 32 is interleaved with the product, because the matrix unit leaves the vector
//   units idle. In the backward pass, G = g(X) is rounded to bfloat16, and O += G K follows while G
//   is in L1.
//
// S is computed once forward and twice backward. That is a quarter more multiplications than
// necessary for the softmax, and a third more for the sigmoid. In return no sum leaves a core's
// caches, memory beyond the results is 4 MiB a thread, and each element has a fixed order of
// summation. A block of K is packed in both layouts, for X and for O, once for every kQueryRows
// rows of Q.
#define BCLIP_ISA amx
#include "csrc/contrastive.h"
#include "csrc/cpu/contrastive/contrastive_kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd/target.h"

#ifdef BCLIP_ISA_AVAILABLE

#include "csrc/cpu/simd/amx_tiles.h"
#include "csrc/cpu/simd/math.h"

namespace bclip::cpu {

namespace amx {

namespace {

constexpr int64_t kColumnsAtOnce = 2048;  // the least number of columns of a forward task
// The largest number of ranges of rows, and of ranges of columns. A row or column has one partial
// sum for each range.
constexpr int64_t kMostRanges = 32;
// The number of rows over which a column is summed in single precision.
constexpr int64_t kRowsInSingle = 256;

// The lane of the positive of row i, or -1 if it is outside this tile.
BCLIP_INLINE int64_t positive_lane(const TilePosition& position, int64_t i) {
  const int64_t lane = position.lane + i;
  return static_cast<uint64_t>(lane) < static_cast<uint64_t>(kPanel) ? lane : -1;
}

BCLIP_INLINE void store_rounded(__m512 first, __m512 second, uint16_t* to) {
  _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// The ids and shares of the groups, by rows of Q and of K.
struct QueryGroups {
  QueryGroups(const Groups& groups, bool query_is_image)
      : query(query_is_image ? groups.rows : groups.columns),
        key(query_is_image ? groups.columns : groups.rows),
        query_shares(query_is_image ? groups.row_shares : groups.column_shares),
        key_shares(query_is_image ? groups.column_shares : groups.row_shares) {}

  const int32_t *const query, *const key;
  const float *const query_shares, *const key_shares;
};

class ExponentialSums {
 public:
  static constexpr bool kWithGradient = false;

  // Adds to `rows` (all rows of Q) and `columns` (all rows of K).
  ExponentialSums(double factor, float offset, double* rows, double* columns)
      : factor_(factor), offset_(_mm512_set1_ps(offset)), rows_(rows), columns_(columns) {}

  void begin_block(int64_t column, int64_t count) {
    column_ = column;
    count_ = count;
    partial_.assign(padded(count), 0.f);
  }
  void begin_panel() { std::fill_n(&row_sums_[0][0], kPanel * kHalf, 0.f); }

  inline __attribute__((always_inline)) void row(const TilePosition& position, int64_t i,
                                                 const float* dots, uint16_t*) {
    uint32_t counted = position.columns;
    const int64_t positive = positive_lane(position, i);
    if (positive >= 0) counted &= ~(1u << positive);
    float* columns = partial_.data() + (position.column - column_);
    __m512 row_sum = _mm512_load_ps(row_sums_[i]);
    for (int64_t half = 0; half < kPanel; half += kHalf) {
      const __m512 e = Exp2AffineAmx(_mm512_load_ps(dots + half), factor_, offset_);
      const __m512 kept = _mm512_maskz_mov_ps(static_cast<__mmask16>(counted >> half), e);
      row_sum = _mm512_add_ps(row_sum, kept);
      _mm512_storeu_ps(columns + half, _mm512_add_ps(_mm512_loadu_ps(columns + half), kept));
    }
    _mm512_store_ps(row_sums_[i], row_sum);
  }

  void end_panel(int64_t row, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      rows_[row + i] += _mm512_reduce_add_ps(_mm512_load_ps(row_sums_[i]));
    if ((row + kPanel) % kRowsInSingle == 0) add_columns();
  }
  void end_block() { add_columns(); }

 private:
  void add_columns() {
    for (int64_t i = 0; i < count_; ++i) columns_[column_ + i] += partial_[i];
    std::fill(partial_.begin(), partial_.end(), 0.f);
  }

  const Factor factor_;
  const __m512 offset_;
  double *const rows_, *const columns_;
  alignas(64) float row_sums_[kPanel][kHalf];
  std::vector<float> partial_;
  int64_t column_ = 0, count_ = 0;
};

// A mask of the 16 columns from `column` on: those in the group of row `row` of Q.
BCLIP_INLINE __mmask16 same_group(const QueryGroups& groups, int64_t row, int64_t column,
                                  __mmask16 present) {
  const __m512i ids = _mm512_maskz_loadu_epi32(present, groups.key + column);
  return _mm512_mask_cmpeq_epi32_mask(present, ids, _mm512_set1_epi32(groups.query[row]));
}

template <bool kOneOffset, bool kGroups>
class SoftmaxGradient {
 public:
  static constexpr bool kWithGradient = true;

  SoftmaxGradient(const GradientTile& all, bool query_is_image)
      : factor_(all.factor),
        query_(query_is_image ? all.rows : all.columns),
        key_(query_is_image ? all.columns : all.rows),
        positive_grad_(all.positive_grad),
        query_is_image_(query_is_image),
        groups_(all.groups, query_is_image) {}

  void begin_block(int64_t, int64_t) {}
  void begin_panel() { products_ = _mm512_setzero_ps(); }

  inline __attribute__((always_inline)) void row(const TilePosition& position, int64_t i,
                                                 const float* dots, uint16_t* gradient) {
    const int64_t row = position.row + i;
    const __m512 offset = _mm512_set1_ps(query_.offsets[row]),
                 share = _mm512_set1_ps(query_.shares[row]);
    __m512 g[2];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = position.column + half * kHalf;
      const __mmask16 present = half_of(position.columns, half);
      const __m512 x = _mm512_load_ps(dots + half * kHalf);
      const __m512 e = Exp2AffineAmx(x, factor_, offset);
      const __m512 key_share = _mm512_maskz_loadu_ps(present, key_.shares + column);
      if (kOneOffset) {
        g[half] = _mm512_maskz_mul_ps(present, e, _mm512_add_ps(share, key_share));
      } else {
        const __m512 key_offset = _mm512_maskz_loadu_ps(present, key_.offsets + column);
        const __m512 column_part = _mm512_mul_ps(Exp2AffineAmx(x, factor_, key_offset), key_share);
        g[half] = _mm512_maskz_fmadd_ps(present, e, share, column_part);
      }
      if (kGroups) {
        const __mmask16 same = same_group(groups_, row, column, present);
        const __m512 target =
            _mm512_add_ps(_mm512_set1_ps(groups_.query_shares[row]),
                          _mm512_maskz_loadu_ps(present, groups_.key_shares + column));
        g[half] = _mm512_mask_sub_ps(g[half], same, g[half], target);
      }
    }
    const int64_t lane = positive_lane(position, i);
    if (lane >= 0 && position.columns >> lane & 1) {
      const __m512 positive =
          _mm512_set1_ps(positive_grad_[query_is_image_ ? row : position.column + lane]);
      for (int64_t half = 0; half < 2; ++half)
        g[half] = _mm512_mask_mov_ps(g[half], half_of(1u << lane, half), positive);
    }
    for (int64_t half = 0; half < 2; ++half)
      products_ = _mm512_fmadd_ps(g[half], _mm512_load_ps(dots + half * kHalf), products_);
    store_rounded(g[0], g[1], gradient);
  }

  void end_panel(int64_t, int64_t) { product += _mm512_reduce_add_ps(products_); }
  void end_block() {}

  double product = 0;  // sum of G X, with G before it is rounded

 private:
  __m512 products_;
  const Factor factor_;
  const Shares query_, key_;
  const float* const positive_grad_;  // by image
  const bool query_is_image_;
  const QueryGroups groups_;
};

template <bool kGradient, bool kGroups>
class SigmoidGradient {
 public:
  static constexpr bool kWithGradient = kGradient;

  SigmoidGradient(const SigmoidTile& all, bool query_is_image)
      : all_(all), minus_log2_e_(-1.4426950408889634), groups_(all.groups, query_is_image) {}

  void begin_block(int64_t, int64_t) {}
  void begin_panel() { losses_ = gradients_ = products_ = _mm512_setzero_ps(); }

  inline __attribute__((always_inline)) void row(const TilePosition& position, int64_t i,
                                                 const float* dots, uint16_t* gradient) {
    const int64_t lane = positive_lane(position, i);
    const uint32_t positives = lane < 0 ? 0 : 1u << lane;
    const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.f),
                 minus_zero = _mm512_set1_ps(-0.f);
    __m512 g[2];
    for (int64_t half = 0; half < 2; ++half) {
      const __mmask16 present = half_of(position.columns, half);
      const __mmask16 positive =
          kGroups ? same_group(groups_, position.row + i, position.column + half * kHalf, present)
                  : half_of(positives, half);
      const __m512 x = _mm512_load_ps(dots + half * kHalf);
      __m512 z = _mm512_fmadd_ps(x, _mm512_set1_ps(all_.scale), _mm512_set1_ps(all_.bias));
      z = _mm512_mask_xor_ps(z, positive, z, minus_zero);  // -y S, so -S at the positives
      const __m512 u = Exp2AffineAmx(_mm512_abs_ps(z), minus_log2_e_, zero);
      // max returns its second operand if one is NaN, so NaN reaches the loss.
      const __m512 loss = _mm512_add_ps(_mm512_max_ps(zero, z), (__m512)Log1pUnit((Lanes)u));
      losses_ = _mm512_mask_add_ps(losses_, present, losses_, loss);
      if (!kGradient) continue;
      const __m512 numerator = _mm512_mask_mov_ps(u, _mm512_cmp_ps_mask(z, zero, _CMP_GT_OQ), one);
      const __m512 size = _mm512_maskz_div_ps(
          present, _mm512_mul_ps(numerator, _mm512_set1_ps(all_.weight)), _mm512_add_ps(u, one));
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
  const Factor minus_log2_e_;
  const QueryGroups groups_;
  __m512 losses_, gradients_, products_;
};

// Writes scale * O to the rows of `gradient` (all rows of Q, D).
void finish(const Features& query, int64_t begin, int64_t end, const float* result, double scale,
            void* gradient, bool in_single) {
  const __m512 factor = _mm512_set1_ps(static_cast<float>(scale));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t panel = (row - begin) / kPanel, i = (row - begin) % kPanel;
    for (int64_t k = 0; k < query.width; k += kPanel) {
      const float* from = result + panel * kPanel * padded(query.width) + k * kPanel + i * kPanel;
      const __m512 first = _mm512_mul_ps(_mm512_load_ps(from), factor);
      const __m512 second = _mm512_mul_ps(_mm512_load_ps(from + kHalf), factor);
      const __mmask32 present = query.columns(k);
      const int64_t place = row * query.width + k;
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

// Runs a consumer from make_consumer() over each block of kQueryRows rows of Q. Then calls
// keep(number of the task, consumer).
template <typename MakeConsumer, typename Keep>
void gradient_of(const Features& query, const Features& key, int64_t shift,
                 const AmxGradients& gradients, void* gradient, int threads,
                 const MakeConsumer& make_consumer, const Keep& keep) {
  const int64_t query_rows = std::min(kQueryRows, query.count);
  constexpr bool with_gradient = decltype(make_consumer())::kWithGradient;
  with_memory(tasks_of(query.count), threads, query_rows, key.count, query.width, with_gradient,
              [&](int64_t task, const TileMemory& memory) {
                const int64_t begin = task * kQueryRows,
                              end = std::min(begin + kQueryRows, query.count);
                auto consumer = make_consumer();
                for_each_tile(query, begin, end, key, 0, key.count, shift, memory, consumer);
                if (with_gradient)
                  finish(query, begin, end, memory.result.data, gradients.scale, gradient,
                         gradients.in_single);
                keep(task, consumer);
              });
}

void check(const AmxProblem& problem) {
  if (!has_amx())
    throw std::invalid_argument("contrastive: this machine has no AMX, or Linux denies it");
  if (problem.rows < 0 || problem.columns < 0 || problem.width < 0)
    throw std::invalid_argument("contrastive: a problem has negative sizes");
}

Features images_of(const AmxProblem& problem) {
  return {problem.image, problem.rows, problem.width};
}
Features texts_of(const AmxProblem& problem) {
  return {problem.text, problem.columns, problem.width};
}

}  // namespace

}  // namespace amx

using namespace amx;

void amx_exponential_sums(const AmxProblem& problem, double factor, float offset, const Sums& sums,
                          int threads) {
  check(problem);
  const Features images = images_of(problem), texts = texts_of(problem);
  // A task for each pair of a row range and a column range. It adds to partial sums that no other
  // task touches.
  const int64_t rows_a_task = std::max(kQueryRows, padded(images.count / kMostRanges));
  const int64_t row_ranges = (images.count + rows_a_task - 1) / rows_a_task;
  const int64_t columns_a_task = std::max(kColumnsAtOnce, padded(texts.count / kMostRanges));
  const int64_t column_ranges = (texts.count + columns_a_task - 1) / columns_a_task;
  std::vector<double> rows(column_ranges * images.count), columns(row_ranges * texts.count);
  with_memory(row_ranges * column_ranges, threads, rows_a_task,
              std::min(columns_a_task, texts.count), images.width, false,
              [&](int64_t task, const TileMemory& memory) {
                const int64_t row_range = task / column_ranges, column_range = task % column_ranges;
                const int64_t begin = row_range * rows_a_task, from = column_range * columns_a_task;
                const int64_t end = std::min(begin + rows_a_task, images.count);
                const int64_t to = std::min(from + columns_a_task, texts.count);
                ExponentialSums consumer(factor, offset, rows.data() + column_range * images.count,
                                         columns.data() + row_range * texts.count);
                for_each_tile(images, begin, end, texts, from, to, problem.first, memory, consumer);
              });
  for (int64_t row = 0; row < images.count; ++row) {
    double total = 0;
    for (int64_t range = 0; range < column_ranges; ++range)
      total += rows[range * images.count + row];
    sums.rows[row] = static_cast<float>(total);
  }
  for (int64_t range = 0; range < row_ranges; ++range)
    for (int64_t column = 0; column < texts.count; ++column)
      sums.columns[column] += columns[range * texts.count + column];
}

double amx_softmax_gradient(const AmxProblem& problem, const Softmax& softmax,
                            const AmxGradients& gradients, int threads) {
  check(problem);
  const Features images = images_of(problem), texts = texts_of(problem);
  const SoftmaxShares shares(softmax, problem.rows, problem.columns);
  const GradientTile all = shares.tile(0, 0);
  std::vector<double> products(tasks_of(problem.rows));
  const auto run = [&](auto one_offset, auto groups) {
    using Consumer = SoftmaxGradient<decltype(one_offset)::value, decltype(groups)::value>;
    gradient_of(
        images, texts, problem.first, gradients, gradients.image, threads,
        [&] { return Consumer(all, true); },
        [&](int64_t task, const Consumer& consumer) { products[task] = consumer.product; });
    gradient_of(
        texts, images, -problem.first, gradients, gradients.text, threads,
        [&] { return Consumer(all, false); }, [](int64_t, const Consumer&) {});
  };
  if (all.groups.rows)
    all.one_offset ? run(std::true_type(), std::true_type())
                   : run(std::false_type(), std::true_type());
  else
    all.one_offset ? run(std::true_type(), std::false_type())
                   : run(std::false_type(), std::false_type());
  return std::accumulate(products.begin(), products.end(), 0.0);
}

SigmoidSums amx_sigmoid_gradient(const AmxProblem& problem, const Sigmoid& sigmoid,
                                 const AmxGradients& gradients, int threads) {
  check(problem);
  const Features images = images_of(problem), texts = texts_of(problem);
  const SigmoidTile all(sigmoid);
  std::vector<SigmoidSums> partial(tasks_of(problem.rows));
  const auto run = [&](auto with_gradients, auto groups) {
    using Consumer = SigmoidGradient<decltype(with_gradients)::value, decltype(groups)::value>;
    gradient_of(
        images, texts, problem.first, gradients, gradients.image, threads,
        [&] { return Consumer(all, true); },
        [&](int64_t task, const Consumer& consumer) { partial[task] = consumer.sums; });
    if constexpr (Consumer::kWithGradient)
      gradient_of(
          texts, images, -problem.first, gradients, gradients.text, threads,
          [&] { return Consumer(all, false); }, [](int64_t, const Consumer&) {});
  };
  if (all.groups.rows)
    sigmoid.with_gradients ? run(std::true_type(), std::true_type())
                           : run(std::false_type(), std::true_type());
  else
    sigmoid.with_gradients ? run(std::true_type(), std::false_type())
                           : run(std::false_type(), std::false_type());
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

void amx_exponential_sums(const AmxProblem&, double, float, const Sums&, int) { refuse(); }

double amx_softmax_gradient(const AmxProblem&, const Softmax&, const AmxGradients&, int) {
  refuse();
}

SigmoidSums amx_sigmoid_gradient(const AmxProblem&, const Sigmoid&, const AmxGradients&, int) {
  refuse();
}

}  // namespace bclip::cpu

#endif
