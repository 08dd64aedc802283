// The kernels of pointwise_kernels.h, for the target that the including file has chosen.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "pointwise_kernels.h"

namespace {

using bclip::cpu::AddNorm;
using bclip::cpu::AddNormGradient;
using bclip::cpu::Dropout;
using bclip::cpu::Values;

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint64_t WideBits __attribute__((vector_size(64)));

BCLIP_INLINE Values row_of(const Values& values, int64_t index) {
  return {values.at ? static_cast<char*>(values.at) + index * (values.half ? 2 : 4) : nullptr, values.half};
}

BCLIP_INLINE Lanes load(const Values& from, int64_t at) {
  if (!from.half) return load(static_cast<const float*>(from.at) + at);
  Halves halves;
  std::memcpy(&halves, static_cast<const uint16_t*>(from.at) + at, sizeof halves);
  return (Lanes)(__builtin_convertvector(halves, Bits) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
BCLIP_INLINE void store(const Values& to, int64_t at, Lanes lanes) {
  if (!to.half) return store(static_cast<float*>(to.at) + at, lanes);
  const Bits bits = (Bits)lanes;
  Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  rounded = lanes != lanes ? Bits{} + 0x7FC0u : rounded;
  const Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(static_cast<uint16_t*>(to.at) + at, &halves, sizeof halves);
}

BCLIP_INLINE Lanes load_first(const Values& from, int64_t at, int64_t count) {
  if (count >= kLanes) return load(from, at);
  float padded[kLanes] = {};
  std::memcpy(padded, row_of(from, at).at, count * (from.half ? 2 : 4));
  return load(Values{padded, from.half}, 0);
}

BCLIP_INLINE void store_first(const Values& to, int64_t at, Lanes lanes, int64_t count) {
  if (count >= kLanes) return store(to, at, lanes);
  float padded[kLanes];
  store(Values{padded, to.half}, 0, lanes);
  std::memcpy(row_of(to, at).at, padded, count * (to.half ? 2 : 4));
}

// Of a 64-bit lane the low half counts.
BCLIP_INLINE WideBits times(WideBits a, uint32_t factor) {
#ifdef __AVX512F__
  return (WideBits)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(factor));
#else
  return (a & 0xFFFFFFFF) * factor;
#endif
}

// keep of one row: 0 or `kept`, columns rounded up to 32. Eight counters go at a time, in an order from which two
// interleavings bring their words into that of the columns.
void fill_keep(const Dropout& dropout, int64_t row, int64_t columns, float* keep) {
  const Lanes kept = splat(dropout.kept);
  for (int64_t start = 0; start < columns; start += 2 * kLanes) {
    WideBits a = WideBits{0, 4, 1, 5, 2, 6, 3, 7} + static_cast<uint64_t>(start / 4);
    WideBits b = WideBits{} + static_cast<uint64_t>(row), c = {}, d = {};
    uint32_t low = static_cast<uint32_t>(dropout.seed), high = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
      const WideBits first = times(a, 0xD2511F53u), second = times(c, 0xCD9E8D57u);
      a = (second >> 32) ^ b ^ low;
      c = (first >> 32) ^ d ^ high;
      b = second;
      d = first;
    }
    const WideBits ab = (a & 0xFFFFFFFF) | b << 32, cd = (c & 0xFFFFFFFF) | d << 32;
    const Bits left = (Bits)__builtin_shuffle(ab, cd, WideBits{0, 8, 2, 10, 4, 12, 6, 14});
    const Bits right = (Bits)__builtin_shuffle(ab, cd, WideBits{1, 9, 3, 11, 5, 13, 7, 15});
    store(keep + start, left < dropout.drop_below ? Lanes{} : kept);
    store(keep + start + kLanes, right < dropout.drop_below ? Lanes{} : kept);
  }
}

struct Moments {
  float mean, inverse;  // of the deviation
};

// Two passes over a row in L1: the one-pass form loses what the mean and the spread differ by.
BCLIP_INLINE Moments moments(const Values& row, int64_t columns, double eps) {
  Lanes total = {};
  for (int64_t j = 0; j < columns; j += kLanes) total += load_first(row, j, columns - j);
  const float mean = sum(total) / columns;
  Lanes squares = {};
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Lanes centred = zero_from(load_first(row, j, columns - j) - mean, columns - j);
    squares += centred * centred;
  }
  return {mean, static_cast<float>(1 / std::sqrt(static_cast<double>(sum(squares)) / columns + eps))};
}

void add_norm(const AddNorm& norm, int64_t first, int64_t last, float* keep) {
  const int64_t columns = norm.columns;
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * columns;
    const Values stream = row_of(norm.stream, start), branch = row_of(norm.branch, start);
    const Values total = norm.branch.at ? row_of(norm.total, start) : stream;
    if (norm.branch.at) {
      if (norm.dropout.drop_below) fill_keep(norm.dropout, row, columns, keep);
      for (int64_t j = 0; j < columns; j += kLanes) {
        Lanes added = load_first(branch, j, columns - j);
        if (norm.dropout.drop_below) added *= load(keep + j);
        store_first(total, j, load_first(stream, j, columns - j) + added, columns - j);
      }
    }
    const Moments moment = moments(total, columns, norm.eps);
    const Values normed = row_of(norm.normed, start), wide = row_of(norm.wide, start);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t left = columns - j;
      const Lanes centred = (load_first(total, j, left) - moment.mean) * moment.inverse;
      const Lanes result = centred * load_first(norm.weight, j, left) + load_first(norm.bias, j, left);
      store_first(normed, j, result, left);
      if (wide.at) store_first(wide, j, result, left);
    }
  }
}

void add_norm_backward(const AddNormGradient& norm, int64_t first, int64_t last, float* keep, float* sums) {
  const int64_t columns = norm.columns;
  const Values weight_sums = {sums, false}, bias_sums = {sums + columns, false};
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * columns;
    const Values grad = row_of(norm.grad, start), wide = row_of(norm.wide_grad, start);
    const Values total = row_of(norm.total, start), total_grad = row_of(norm.total_grad, start);
    const Moments moment = moments(total, columns, norm.eps);
    const auto upstream = [&](int64_t j, int64_t left) {
      Lanes g = grad.at ? load_first(grad, j, left) : Lanes{};
      return wide.at ? g + load_first(wide, j, left) : g;
    };
    Lanes mean = {}, along = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t left = columns - j;
      const Lanes g = upstream(j, left), x = (load_first(total, j, left) - moment.mean) * moment.inverse;
      const Lanes h = g * load_first(norm.weight, j, left);
      mean += h;
      along += h * x;
      store_first(weight_sums, j, load_first(weight_sums, j, left) + g * x, left);
      store_first(bias_sums, j, load_first(bias_sums, j, left) + g, left);
    }
    const float mean_of_h = sum(mean) / columns, mean_of_hx = sum(along) / columns;
    const Values stream_grad = row_of(norm.stream_grad, start), branch_grad = row_of(norm.branch_grad, start);
    if (branch_grad.at && norm.dropout.drop_below) fill_keep(norm.dropout, row, columns, keep);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t left = columns - j;
      const Lanes x = (load_first(total, j, left) - moment.mean) * moment.inverse;
      const Lanes h = upstream(j, left) * load_first(norm.weight, j, left);
      Lanes result = (h - mean_of_h - x * mean_of_hx) * moment.inverse;
      if (total_grad.at) result += load_first(total_grad, j, left);
      store_first(stream_grad, j, result, left);
      if (!branch_grad.at) continue;
      store_first(branch_grad, j, norm.dropout.drop_below ? result * load(keep + j) : result, left);
    }
  }
}

struct Normal {
  Lanes below, density;  // Phi(x), and phi(x) sqrt(2 pi)
};

// Abramowitz and Stegun 7.1.26 for erfc(|x| / sqrt 2), 1.5e-7 absolute; torch's vectors use the same.
BCLIP_INLINE Normal normal(Lanes x) {
  static const Factor factor(-0.72134752044448170);  // log2(e) / -2
  const Lanes density = exp2_affine(x * x, factor, Lanes{});
  const Lanes t = 1.f / (0.23164189f * abs(x) + 1.f);  // 0.3275911 / sqrt 2
  Lanes tail = splat(1.061405429f);
  tail = tail * t - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = tail * t + 0.254829592f;
  tail = tail * t * density * 0.5f;
  return {x < 0.f ? tail : 1.f - tail, density};
}

void gelu(Values x, Values out, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += kLanes) {
    const Lanes value = load_first(x, i, last - i);
    store_first(out, i, value * normal(value).below, last - i);
  }
}

void gelu_backward(Values grad, Values x, Values out, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += kLanes) {
    const Lanes value = load_first(x, i, last - i);
    const Normal at = normal(value);
    const Lanes slope = at.below + value * at.density * 0.3989422804f;
    store_first(out, i, load_first(grad, i, last - i) * slope, last - i);
  }
}

}  // namespace
