// The kernels of pointwise_kernels.h, for the target that the including file has chosen.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/cpu/simd/vec.h"
#include "csrc/cpu/pointwise/pointwise_kernels.h"

namespace {

using bclip::cpu::AddNorm;
using bclip::cpu::AddNormGradient;
using bclip::cpu::Dropout;
using bclip::cpu::Values;

BCLIP_INLINE Values row_of(const Values& values, int64_t index) {
  return {values.at ? static_cast<char*>(values.at) + index * (values.half ? 2 : 4) : nullptr, values.half};
}

// `count` values as floats, zeros after them up to whole lanes: in `buffer`, unless they lie so already.
BCLIP_INLINE const float* floats(const Values& from, int64_t count, float* buffer) {
  const int64_t whole = count / kLanes * kLanes;
  if (!from.half && whole == count) return static_cast<const float*>(from.at);
  if (whole < count) store(buffer + whole, Lanes{});
  if (!from.half) {
    std::memcpy(buffer, from.at, count * sizeof(float));
    return buffer;
  }
  const uint16_t* const halves = static_cast<const uint16_t*>(from.at);
  for (int64_t j = 0; j < whole; j += kLanes) store(buffer + j, load(halves + j));
  for (int64_t j = whole; j < count; ++j) {
    const uint32_t bits = static_cast<uint32_t>(halves[j]) << 16;
    std::memcpy(buffer + j, &bits, sizeof bits);
  }
  return buffer;
}

// Where to put `count` floats, in whole lanes, for settle() to bring to `to`.
BCLIP_INLINE float* place(const Values& to, int64_t count, float* buffer) {
  return to.half || count % kLanes ? buffer : static_cast<float*>(to.at);
}

BCLIP_INLINE void settle(const Values& to, int64_t count, const float* from) {
  if (from == to.at) return;
  if (!to.half) {
    std::memcpy(to.at, from, count * sizeof(float));
    return;
  }
  uint16_t* const halves = static_cast<uint16_t*>(to.at);
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) store(halves + j, load(from + j));
  if (whole == count) return;
  uint16_t last[kLanes];
  store(last, load(from + whole));
  std::memcpy(halves + whole, last, (count - whole) * sizeof(uint16_t));
}

// keep of one row: 0 or `kept`, columns rounded up to 32. Eight counters go at a time, in an order from which two
// interleavings bring their words into that of the columns.
void fill_keep(const Dropout& dropout, int64_t row, int64_t columns, float* keep) {
  const Lanes kept = splat(dropout.kept);
  for (int64_t start = 0; start < columns; start += 2 * kLanes) {
    constexpr uint64_t order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    WideWords a = load_as<WideWords>(order) + static_cast<uint64_t>(start / 4);
    WideWords b = WideWords{} + static_cast<uint64_t>(row), c = {}, d = {};
    uint32_t low = static_cast<uint32_t>(dropout.seed), high = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
      const WideWords first = times(a, 0xD2511F53u), second = times(c, 0xCD9E8D57u);
      a = (second >> 32) ^ b ^ low;
      c = (first >> 32) ^ d ^ high;
      b = second;
      d = first;
    }
    const WideWords ab = (a & 0xFFFFFFFF) | b << 32, cd = (c & 0xFFFFFFFF) | d << 32;
    const Words left = as<Words>(interleave<false>(ab, cd)), right = as<Words>(interleave<true>(ab, cd));
    store(keep + start, select(left < dropout.drop_below, Lanes{}, kept));
    store(keep + start + kLanes, select(right < dropout.drop_below, Lanes{}, kept));
  }
}

struct Moments {
  float mean, inverse;  // of the deviation
};

// sum over j of term(lanes at j, j), four sums at a time.
template <typename Term>
BCLIP_INLINE float sum_of(const float* row, int64_t columns, const Term& term) {
  Lanes totals[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= columns; j += 4 * kLanes)
    for (int i = 0; i < 4; ++i) totals[i] += term(load(row + j + i * kLanes), j + i * kLanes);
  for (; j < columns; j += kLanes) totals[0] += term(load(row + j), j);
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// Two passes over a row in L1: the one-pass form loses what the mean and the spread differ by.
BCLIP_INLINE Moments moments(const float* row, int64_t columns, double eps) {
  const float mean = sum_of(row, columns, [](Lanes lanes, int64_t) { return lanes; }) / columns;
  const int64_t whole = columns / kLanes * kLanes;
  float squares = sum_of(row, whole, [&](Lanes lanes, int64_t) { return (lanes - mean) * (lanes - mean); });
  if (whole < columns) {
    const Lanes centred = zero_from(load(row + whole) - mean, columns - whole);
    squares += sum(centred * centred);
  }
  return {mean, static_cast<float>(1 / std::sqrt(static_cast<double>(squares) / columns + eps))};
}

void add_norm(const AddNorm& norm, int64_t first, int64_t last, float* scratch) {
  const int64_t columns = norm.columns, width = (columns + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  float *const keep = scratch, *const own = keep + width, *const other = own + width;
  const float* const weight = floats(norm.weight, columns, other + width);
  const float* const bias = floats(norm.bias, columns, other + 2 * width);
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * columns;
    const float* total = floats(row_of(norm.stream, start), columns, own);
    if (norm.branch.at) {
      const float* const branch = floats(row_of(norm.branch, start), columns, other);
      const Values to = row_of(norm.total, start);
      float* const sums = place(to, columns, own);
      if (norm.dropout.drop_below) {
        fill_keep(norm.dropout, row, columns, keep);
        for (int64_t j = 0; j < columns; j += kLanes)
          store(sums + j, load(total + j) + load(branch + j) * load(keep + j));
      } else {
        for (int64_t j = 0; j < columns; j += kLanes) store(sums + j, load(total + j) + load(branch + j));
      }
      settle(to, columns, sums);
      total = to.half ? floats(to, columns, own) : sums;  // the rounded sum is what goes on
    }
    const Moments moment = moments(total, columns, norm.eps);
    const Lanes mean = splat(moment.mean), inverse = splat(moment.inverse);
    for (int64_t j = 0; j < columns; j += kLanes)
      store(other + j, (load(total + j) - mean) * inverse * load(weight + j) + load(bias + j));
    settle(row_of(norm.normed, start), columns, other);
    if (norm.wide.at) settle(row_of(norm.wide, start), columns, other);
  }
}

void add_norm_backward(const AddNormGradient& norm, int64_t first, int64_t last, float* scratch, float* sums) {
  const int64_t columns = norm.columns, width = (columns + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  float *const keep = scratch, *const own = keep + width, *const other = own + width, *const third = other + width;
  const float* const weight = floats(norm.weight, columns, third + width);
  float *const weight_sums = sums, *const bias_sums = sums + width;
  const Values some = norm.grad.at ? norm.grad : norm.wide_grad;
  if (!some.at) std::fill_n(other, width, 0.f);
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * columns;
    const float* const total = floats(row_of(norm.total, start), columns, own);
    const Moments moment = moments(total, columns, norm.eps);
    const Lanes mean = splat(moment.mean), inverse = splat(moment.inverse);
    const float* upstream = some.at ? floats(row_of(some, start), columns, other) : other;
    if (norm.grad.at && norm.wide_grad.at) {
      const float* const wide = floats(row_of(norm.wide_grad, start), columns, third);
      for (int64_t j = 0; j < columns; j += kLanes) store(other + j, load(upstream + j) + load(wide + j));
      upstream = other;
    }
    Lanes all = {}, along = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Lanes g = load(upstream + j), x = (load(total + j) - mean) * inverse, h = g * load(weight + j);
      all += h;
      along += h * x;
      store(weight_sums + j, load(weight_sums + j) + g * x);
      store(bias_sums + j, load(bias_sums + j) + g);
    }
    const Lanes mean_of_h = splat(sum(all) / columns), mean_of_hx = splat(sum(along) / columns);
    const Values to = row_of(norm.stream_grad, start);
    float* const result = place(to, columns, own);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Lanes x = (load(total + j) - mean) * inverse, h = load(upstream + j) * load(weight + j);
      store(result + j, (h - mean_of_h - x * mean_of_hx) * inverse);
    }
    if (norm.total_grad.at) {
      const float* const more = floats(row_of(norm.total_grad, start), columns, third);
      for (int64_t j = 0; j < columns; j += kLanes) store(result + j, load(result + j) + load(more + j));
    }
    settle(to, columns, result);
    if (!norm.branch_grad.at) continue;
    const Values branch = row_of(norm.branch_grad, start);
    if (!norm.dropout.drop_below) {
      settle(branch, columns, result);
      continue;
    }
    fill_keep(norm.dropout, row, columns, keep);
    for (int64_t j = 0; j < columns; j += kLanes) store(keep + j, load(result + j) * load(keep + j));
    settle(branch, columns, keep);
  }
}

// Of x from 1 to infinity.
BCLIP_INLINE Lanes reciprocal(Lanes x) {
#ifdef BCLIP_AVX512
  const Lanes near = (Lanes)_mm512_rcp14_ps((__m512)x);
  // Infinity's is 0, which the refinement would multiply with it.
  return select(near > 0.f, near * (2.f - x * near), near);
#else
  return 1.f / x;
#endif
}

struct Normal {
  Lanes below, density;  // Phi(x), and phi(x) sqrt(2 pi)
};

// Abramowitz and Stegun 7.1.26 for erfc(|x| / sqrt 2), 1.5e-7 absolute; torch's vectors use the same.
BCLIP_INLINE Normal normal(Lanes x, const Factor& factor) {
  const Lanes density = exp2_affine(x * x, factor, Lanes{});
  const Lanes t = reciprocal(0.23164189f * abs(x) + 1.f);  // 0.3275911 / sqrt 2
  Lanes tail = splat(1.061405429f);
  tail = tail * t - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = tail * t + 0.254829592f;
  tail = tail * t * density * 0.5f;
  return {select(x < 0.f, tail, 1.f - tail), density};
}

// out = of(lanes of x, lanes of y) for values [first, last), all of one dtype.
template <typename Of>
BCLIP_INLINE void each(const Values& x, const Values& y, const Values& out, int64_t first, int64_t last, const Of& of) {
  const int64_t whole = first + (last - first) / kLanes * kLanes;
  if (x.half) {
    const uint16_t *const a = static_cast<const uint16_t*>(x.at), *const b = static_cast<const uint16_t*>(y.at);
    uint16_t* const to = static_cast<uint16_t*>(out.at);
    for (int64_t i = first; i < whole; i += kLanes) store(to + i, of(load(a + i), load(b + i)));
  } else {
    const float *const a = static_cast<const float*>(x.at), *const b = static_cast<const float*>(y.at);
    float* const to = static_cast<float*>(out.at);
    for (int64_t i = first; i < whole; i += kLanes) store(to + i, of(load(a + i), load(b + i)));
  }
  if (whole == last) return;
  float one[kLanes] = {}, two[kLanes] = {};
  const int64_t left = last - whole;
  const Lanes a = load(floats(row_of(x, whole), left, one)), b = load(floats(row_of(y, whole), left, two));
  store(one, of(a, b));
  settle(row_of(out, whole), left, one);
}

void gelu(Values x, Values out, int64_t first, int64_t last) {
  const Factor factor(-0.72134752044448170);  // log2(e) / -2
  each(x, x, out, first, last, [&](Lanes value, Lanes) { return value * normal(value, factor).below; });
}

void gelu_backward(Values grad, Values x, Values out, int64_t first, int64_t last) {
  const Factor factor(-0.72134752044448170);
  each(x, grad, out, first, last, [&](Lanes value, Lanes upstream) {
    const Normal at = normal(value, factor);
    return upstream * (at.below + value * at.density * 0.3989422804f);
  });
}

}  // namespace
