// Attention of one query for each sequence. It reads the keys and values once, so memory bandwidth
// limits it.
#pragma once

#include "csrc/cpu/attention/attention_kernels.h"
#include "csrc/cpu/simd/bf16.h"
#include "csrc/cpu/simd/math.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

// Writes 0 or 1 / (1 - p) for each key of one head of one row.
[[maybe_unused]] void fill_kept(const SingleQueryAttention& attention, int64_t row, int64_t head,
                                int64_t keys, float* factors) {
  const auto threshold = static_cast<uint32_t>(attention.dropout_p * 4294967296.0);
  const auto kept = static_cast<float>(1 / (1 - attention.dropout_p));
  for (int64_t first = 0; first < keys; first += 4) {
    const auto [word0, word1, word2, word3] =
        philox(attention.seed, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(row),
               static_cast<uint32_t>(head), 0);
    const uint32_t words[4] = {word0, word1, word2, word3};
    for (int64_t i = first; i < std::min(first + 4, keys); ++i)
      factors[i] = words[i - first] < threshold ? 0.f : kept;
  }
}

// One sequence: its query, the keys that the query sees, and scratch of (H, padded) numbers with
// padded >= keys.
template <typename Stored>
struct SingleQuery {
  const SingleQueryAttention& attention;
  const int64_t index, start, end, row, keys, padded, width;  // the sequence owns rows [start, end)
  const Stored* const query;
  const Stored* const pairs;  // keys and values from row `start` on
  float *const weights, *const grads, *const factors, *const sums;

  static int64_t numbers(const SingleQueryAttention& attention, int64_t rows) {
    return attention.heads * (3 * ((rows + kLanes - 1) / kLanes * kLanes) + attention.dim);
  }

  SingleQuery(const SingleQueryAttention& attention, int64_t index, float* scratch)
      : attention(attention),
        index(index),
        start(attention.bounds[index]),
        end(attention.bounds[index + 1]),
        row(attention.rows[index]),
        keys((attention.causal ? row + 1 : end) - start),
        padded((keys + kLanes - 1) / kLanes * kLanes),
        width(attention.heads * attention.dim),
        query(static_cast<const Stored*>(attention.query) + index * width),
        pairs(static_cast<const Stored*>(attention.key_value) + start * 2 * width),
        weights(scratch),
        grads(weights + attention.heads * padded),
        factors(grads + attention.heads * padded),
        sums(factors + attention.heads * padded) {
    if (attention.dropout_p > 0)
      for (int64_t head = 0; head < attention.heads; ++head)
        fill_kept(attention, row, head, keys, factors + head * padded);
  }

  // result (H, keys) = the dot products, head by head, of `with` (H, d) and the keys (part 0) or
  // the values (part 1).
  void products(const Stored* with, int64_t part, float* result) const {
    const int64_t dim = attention.dim;
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t head = 0; head < attention.heads; ++head) {
        const Stored *one = with + head * dim, *two = pairs + (2 * key + part) * width + head * dim;
        Lanes products = {};
        for (int64_t i = 0; i < dim; i += kLanes) products += Load(one + i) * Load(two + i);
        result[head * padded + key] = ReduceSum(products);
      }
  }

  // out (H, d) = factor * numbers (H, keys) times the keys (part 0) or the values (part 1).
  void weighted(const float* numbers, int64_t part, float factor, Stored* out) const {
    const int64_t dim = attention.dim;
    for (int64_t i = 0; i < width; i += kLanes) Store(sums + i, Lanes{});
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t head = 0; head < attention.heads; ++head) {
        const Lanes number = Set(numbers[head * padded + key]);
        const Stored* from = pairs + (2 * key + part) * width + head * dim;
        float* to = sums + head * dim;
        for (int64_t i = 0; i < dim; i += kLanes)
          Store(to + i, Load(to + i) + number * Load(from + i));
      }
    for (int64_t i = 0; i < width; i += kLanes) Store(out + i, Load(sums + i) * factor);
  }

  // Applies dropout to the weights.
  void drop() const {
    if (attention.dropout_p > 0)
      for (int64_t head = 0; head < attention.heads; ++head)
        for (int64_t i = head * padded; i < head * padded + keys; ++i) weights[i] *= factors[i];
  }
};

template <typename Stored>
void single_query_forward(const SingleQueryAttention& attention, int64_t index, void* out,
                          float* lse, float* scratch) {
  const SingleQuery<Stored> sequence(attention, index, scratch);
  const int64_t keys = sequence.keys;
  sequence.products(sequence.query, 0, sequence.weights);
  const auto factor = static_cast<float>(attention.scale) * kLog2E;
  for (int64_t head = 0; head < attention.heads; ++head) {
    float* const weights = sequence.weights + head * sequence.padded;
    float highest = -__builtin_inff();
    for (int64_t key = 0; key < keys; ++key)
      highest = weights[key] * factor > highest ? weights[key] * factor : highest;
    Lanes totals = {};
    for (int64_t key = 0; key < keys; key += kLanes) {
      const Lanes numbers = KeepFirstN(Exp2(Load(weights + key) * factor - highest), keys - key);
      totals += numbers;
      Store(weights + key, numbers);
    }
    const float total = ReduceSum(totals);
    for (int64_t key = 0; key < keys; ++key) weights[key] /= total;
    lse[index * attention.heads + head] = highest * kLn2 + __builtin_logf(total);
  }
  sequence.drop();
  sequence.weighted(sequence.weights, 1, 1.f, static_cast<Stored*>(out) + index * sequence.width);
}

template <typename Stored>
void single_query_backward(const SingleQueryAttention& attention,
                           const SingleQueryAttentionGradient& gradient, int64_t index,
                           float* scratch) {
  const SingleQuery<Stored> sequence(attention, index, scratch);
  const int64_t heads = attention.heads, dim = attention.dim, keys = sequence.keys,
                width = sequence.width;
  const auto* out_grad = static_cast<const Stored*>(gradient.out_grad) + index * width;
  const auto* out = static_cast<const Stored*>(gradient.out) + index * width;
  const auto scale = static_cast<float>(attention.scale);
  sequence.products(sequence.query, 0, sequence.weights);
  sequence.products(out_grad, 1, sequence.grads);
  for (int64_t head = 0; head < heads; ++head) {
    Lanes products = {};
    for (int64_t i = head * dim; i < (head + 1) * dim; i += kLanes)
      products += Load(out_grad + i) * Load(out + i);
    const float delta = ReduceSum(products), lse = gradient.lse[index * heads + head] * kLog2E;
    for (int64_t i = head * sequence.padded; i < head * sequence.padded + keys; i += kLanes) {
      const Lanes weight = Exp2(Load(sequence.weights + i) * (scale * kLog2E) - lse);
      Lanes grad = Load(sequence.grads + i);
      if (attention.dropout_p > 0) grad *= Load(sequence.factors + i);
      Store(sequence.weights + i, weight);
      Store(sequence.grads + i, weight * (grad - delta));
    }
  }
  sequence.weighted(sequence.grads, 0, scale,
                    static_cast<Stored*>(gradient.query_grad) + index * width);
  sequence.drop();
  Stored* to = static_cast<Stored*>(gradient.key_value_grad) + sequence.start * 2 * width;
  for (int64_t key = 0; key < keys; ++key, to += 2 * width)
    for (int64_t head = 0; head < heads; ++head) {
      const Lanes weight = Set(sequence.weights[head * sequence.padded + key]);
      const Lanes grad = Set(sequence.grads[head * sequence.padded + key] * scale);
      for (int64_t i = head * dim; i < (head + 1) * dim; i += kLanes) {
        Store(to + i, grad * Load(sequence.query + i));
        Store(to + width + i, weight * Load(out_grad + i));
      }
    }
  std::memset(to, 0, (sequence.end - sequence.start - keys) * 2 * width * sizeof(Stored));
}

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
