// The pointwise kernels.
#pragma once

#include "csrc/cpu/pointwise/pointwise_kernels.h"
#include "csrc/cpu/simd/bf16.h"
#include "csrc/cpu/simd/math.h"
#include "csrc/cpu/simd/philox_vec.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

// The values from number `index` on.
BCLIP_INLINE Values row_of(const Values& values, int64_t index) {
  return {values.at ? static_cast<char*>(values.at) + index * (values.half ? 2 : 4) : nullptr,
          values.half};
}

// `count` values as floats, with zeros after them up to a whole vector. Returns their address in
// memory if they have this form there, else fills and returns `buffer`.
BCLIP_INLINE const float* floats(const Values& from, int64_t count, float* buffer) {
  const int64_t whole = count / kLanes * kLanes;
  if (!from.half && whole == count) return static_cast<const float*>(from.at);
  if (whole < count) Store(buffer + whole, Lanes{});
  if (!from.half) {
    std::memcpy(buffer, from.at, count * sizeof(float));
    return buffer;
  }
  const uint16_t* const halves = static_cast<const uint16_t*>(from.at);
  for (int64_t j = 0; j < whole; j += kLanes) Store(buffer + j, Load(halves + j));
  for (int64_t j = whole; j < count; ++j) {
    const uint32_t bits = static_cast<uint32_t>(halves[j]) << 16;
    std::memcpy(buffer + j, &bits, sizeof bits);
  }
  return buffer;
}

// The address to which the caller writes `count` floats, in whole vectors. settle() then stores
// them to `to`.
BCLIP_INLINE float* place(const Values& to, int64_t count, float* buffer) {
  return to.half || count % kLanes ? buffer : static_cast<float*>(to.at);
}

// Stores `count` floats to `to`, rounded if it is bfloat16.
BCLIP_INLINE void settle(const Values& to, int64_t count, const float* from) {
  if (from == to.at) return;
  if (!to.half) {
    std::memcpy(to.at, from, count * sizeof(float));
    return;
  }
  uint16_t* const halves = static_cast<uint16_t*>(to.at);
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) Store(halves + j, Load(from + j));
  if (whole == count) return;
  uint16_t last[kLanes];
  Store(last, Load(from + whole));
  std::memcpy(halves + whole, last, (count - whole) * sizeof(uint16_t));
}

// Writes `keep` of one row: 0 or `kept` for each column, rounded up to 32 columns. Computes eight
// counters at a time.
void fill_keep(const Dropout& dropout, int64_t row, int64_t columns, float* keep) {
  const Lanes kept = Set(dropout.kept);
  for (int64_t start = 0; start < columns; start += 2 * kLanes) {
    PhiloxVec random = {LoadAs<WideWords>(kPhiloxOrder) + static_cast<uint64_t>(start / 4),
                        WideWords{} + static_cast<uint64_t>(row),
                        {},
                        {}};
    uint32_t key0 = static_cast<uint32_t>(dropout.seed),
             key1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxStep0, key1 += kPhiloxStep1)
      random.Round(key0, key1);
    Words left, right;
    random.Interleaved(left, right);
    Store(keep + start, IfThenElse(left < dropout.drop_below, Lanes{}, kept));
    Store(keep + start + kLanes, IfThenElse(right < dropout.drop_below, Lanes{}, kept));
  }
}

struct Moments {
  float mean, inv_std;
};

// The sum over j of term(vector at j, j), with four partial sums.
template <typename Term>
BCLIP_INLINE float sum_of(const float* row, int64_t columns, const Term& term) {
  Lanes totals[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= columns; j += 4 * kLanes)
    for (int i = 0; i < 4; ++i) totals[i] += term(Load(row + j + i * kLanes), j + i * kLanes);
  for (; j < columns; j += kLanes) totals[0] += term(Load(row + j), j);
  return ReduceSum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// Takes two passes over a row in L1. With one pass, a mean that is large beside the deviation would
// cost precision.
BCLIP_INLINE Moments moments(const float* row, int64_t columns, double eps) {
  const float mean = sum_of(row, columns, [](Lanes lanes, int64_t) { return lanes; }) / columns;
  const int64_t whole = columns / kLanes * kLanes;
  float squares =
      sum_of(row, whole, [&](Lanes lanes, int64_t) { return (lanes - mean) * (lanes - mean); });
  if (whole < columns) {
    const Lanes centred = KeepFirstN(Load(row + whole) - mean, columns - whole);
    squares += ReduceSum(centred * centred);
  }
  return {mean, static_cast<float>(1 / std::sqrt(static_cast<double>(squares) / columns + eps))};
}

void add_norm(const AddNorm& norm, int64_t first, int64_t last, float* scratch) {
  const int64_t columns = norm.columns,
                width = (columns + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  float *const keep = scratch, *const buffer = keep + width, *const second_buffer = buffer + width;
  const float* const weight = floats(norm.weight, columns, second_buffer + width);
  const float* const bias = floats(norm.bias, columns, second_buffer + 2 * width);
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * columns;
    const float* total = floats(row_of(norm.stream, start), columns, buffer);
    if (norm.branch.at) {
      const float* const branch = floats(row_of(norm.branch, start), columns, second_buffer);
      const Values to = row_of(norm.total, start);
      float* const sums = place(to, columns, buffer);
      if (norm.dropout.drop_below) {
        fill_keep(norm.dropout, row, columns, keep);
        for (int64_t j = 0; j < columns; j += kLanes)
          Store(sums + j, Load(total + j) + Load(branch + j) * Load(keep + j));
      } else {
        for (int64_t j = 0; j < columns; j += kLanes)
          Store(sums + j, Load(total + j) + Load(branch + j));
      }
      settle(to, columns, sums);
      // Later operations take the rounded sum.
      total = to.half ? floats(to, columns, buffer) : sums;
    }
    const Moments moment = moments(total, columns, norm.eps);
    const Lanes mean = Set(moment.mean), inv_std = Set(moment.inv_std);
    for (int64_t j = 0; j < columns; j += kLanes)
      Store(second_buffer + j,
            (Load(total + j) - mean) * inv_std * Load(weight + j) + Load(bias + j));
    settle(row_of(norm.normed, start), columns, second_buffer);
    if (norm.wide.at) settle(row_of(norm.wide, start), columns, second_buffer);
  }
}

void add_norm_backward(const AddNormGradient& norm, int64_t first, int64_t last, float* scratch,
                       float* sums) {
  const int64_t columns = norm.columns,
                width = (columns + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  float *const keep = scratch, *const buffer = keep + width, *const second_buffer = buffer + width,
               *const third_buffer = second_buffer + width;
  const float* const weight = floats(norm.weight, columns, third_buffer + width);
  float *const weight_sums = sums, *const bias_sums = sums + width;
  const Values upstream_values = norm.grad.at ? norm.grad : norm.wide_grad;
  if (!upstream_values.at) std::fill_n(second_buffer, width, 0.f);
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * columns;
    const float* const total = floats(row_of(norm.total, start), columns, buffer);
    const Moments moment = moments(total, columns, norm.eps);
    const Lanes mean = Set(moment.mean), inv_std = Set(moment.inv_std);
    const float* upstream = upstream_values.at
                                ? floats(row_of(upstream_values, start), columns, second_buffer)
                                : second_buffer;
    if (norm.grad.at && norm.wide_grad.at) {
      const float* const wide = floats(row_of(norm.wide_grad, start), columns, third_buffer);
      for (int64_t j = 0; j < columns; j += kLanes)
        Store(second_buffer + j, Load(upstream + j) + Load(wide + j));
      upstream = second_buffer;
    }
    Lanes all = {}, along = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Lanes g = Load(upstream + j), x = (Load(total + j) - mean) * inv_std,
                  h = g * Load(weight + j);
      all += h;
      along += h * x;
      Store(weight_sums + j, Load(weight_sums + j) + g * x);
      Store(bias_sums + j, Load(bias_sums + j) + g);
    }
    const Lanes mean_of_h = Set(ReduceSum(all) / columns),
                mean_of_hx = Set(ReduceSum(along) / columns);
    const Values to = row_of(norm.stream_grad, start);
    float* const result = place(to, columns, buffer);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Lanes x = (Load(total + j) - mean) * inv_std, h = Load(upstream + j) * Load(weight + j);
      Store(result + j, (h - mean_of_h - x * mean_of_hx) * inv_std);
    }
    if (norm.total_grad.at) {
      const float* const more = floats(row_of(norm.total_grad, start), columns, third_buffer);
      for (int64_t j = 0; j < columns; j += kLanes)
        Store(result + j, Load(result + j) + Load(more + j));
    }
    settle(to, columns, result);
    if (!norm.branch_grad.at) continue;
    const Values branch = row_of(norm.branch_grad, start);
    if (!norm.dropout.drop_below) {
      settle(branch, columns, result);
      continue;
    }
    fill_keep(norm.dropout, row, columns, keep);
    for (int64_t j = 0; j < columns; j += kLanes)
      Store(keep + j, Load(result + j) * Load(keep + j));
    settle(branch, columns, keep);
  }
}

// 1 / x for x from 1 to infinity.
BCLIP_INLINE Lanes reciprocal(Lanes x) {
#ifdef BCLIP_AVX512
  const Lanes near = (Lanes)_mm512_rcp14_ps((__m512)x);
  // The reciprocal of infinity is 0, which the refinement would turn into NaN.
  return IfThenElse(near > 0.f, near * (2.f - x * near), near);
#else
  return 1.f / x;
#endif
}

struct Normal {
  Lanes below, density;  // Phi(x), and phi(x) sqrt(2 pi)
};

// Abramowitz and Stegun 7.1.26 for erfc(|x| / sqrt 2), with an absolute error of 1.5e-7. torch's
// vector code uses it too.
BCLIP_INLINE Normal normal(Lanes x, const Factor& factor) {
  const Lanes density = Exp2Affine(x * x, factor, Lanes{});
  const Lanes t = reciprocal(0.23164189f * Abs(x) + 1.f);  // 0.3275911 / sqrt 2
  Lanes tail = Set(1.061405429f);
  tail = tail * t - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = tail * t + 0.254829592f;
  tail = tail * t * density * 0.5f;
  return {IfThenElse(x < 0.f, tail, 1.f - tail), density};
}

// out = function(x, y) for values [first, last), all of one dtype.
template <typename Function>
BCLIP_INLINE void each(const Values& x, const Values& y, const Values& out, int64_t first,
                       int64_t last, const Function& function) {
  const int64_t whole = first + (last - first) / kLanes * kLanes;
  if (x.half) {
    const uint16_t *const a = static_cast<const uint16_t*>(x.at), *const b =
                                                                      static_cast<const uint16_t*>(
                                                                          y.at);
    uint16_t* const to = static_cast<uint16_t*>(out.at);
    for (int64_t i = first; i < whole; i += kLanes)
      Store(to + i, function(Load(a + i), Load(b + i)));
  } else {
    const float *const a = static_cast<const float*>(x.at), *const b =
                                                                static_cast<const float*>(y.at);
    float* const to = static_cast<float*>(out.at);
    for (int64_t i = first; i < whole; i += kLanes)
      Store(to + i, function(Load(a + i), Load(b + i)));
  }
  if (whole == last) return;
  float one[kLanes] = {}, two[kLanes] = {};
  const int64_t left = last - whole;
  const Lanes a = Load(floats(row_of(x, whole), left, one)),
              b = Load(floats(row_of(y, whole), left, two));
  Store(one, function(a, b));
  settle(row_of(out, whole), left, one);
}

void gelu(Values x, Values out, int64_t first, int64_t last) {
  const Factor factor(-0.72134752044448170);  // log2(e) / -2
  each(x, x, out, first, last,
       [&](Lanes value, Lanes) { return value * normal(value, factor).below; });
}

void gelu_backward(Values grad, Values x, Values out, int64_t first, int64_t last) {
  const Factor factor(-0.72134752044448170);
  each(x, grad, out, first, last, [&](Lanes value, Lanes upstream) {
    const Normal at = normal(value, factor);
    return upstream * (at.below + value * at.density * 0.3989422804f);
  });
}

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
