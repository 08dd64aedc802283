// One query of each sequence, in attention_tile.h's types. The keys and values are read once, and the memory is the limit.
#pragma once

namespace {

using bclip::cpu::PooledAttention;
using bclip::cpu::PooledAttentionGradient;

// 0 or `kept` for each key, of one head of one row.
[[maybe_unused]] void fill_kept(const PooledAttention& attention, int64_t row, int64_t head, int64_t keys, float* factors) {
  const auto threshold = static_cast<uint32_t>(attention.dropout_p * 4294967296.0);
  const auto kept = static_cast<float>(1 / (1 - attention.dropout_p));
  for (int64_t first = 0; first < keys; first += 4) {
    uint32_t a = static_cast<uint32_t>(first / 4), b = static_cast<uint32_t>(row), c = static_cast<uint32_t>(head);
    uint32_t d = 0, low = static_cast<uint32_t>(attention.seed), high = static_cast<uint32_t>(attention.seed >> 32);
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
      const uint64_t one = uint64_t{0xD2511F53u} * a, two = uint64_t{0xCD9E8D57u} * c;
      a = static_cast<uint32_t>(two >> 32) ^ b ^ low;
      b = static_cast<uint32_t>(two);
      c = static_cast<uint32_t>(one >> 32) ^ d ^ high;
      d = static_cast<uint32_t>(one);
    }
    const uint32_t words[4] = {a, b, c, d};
    for (int64_t i = first; i < std::min(first + 4, keys); ++i)
      factors[i] = words[i - first] < threshold ? 0.f : kept;
  }
}

// One sequence: its row, what it sees, and room for its numbers, (H, padded) with `padded` >= keys.
template <typename Stored>
struct PooledSequence {
  const PooledAttention& attention;
  const int64_t index, start, end, row, keys, padded, width;  // the sequence owns rows [start, end)
  const Stored* const query;
  const Stored* const pairs;  // of row `start`
  float *const weights, *const grads, *const factors, *const sums;

  static int64_t numbers(const PooledAttention& attention, int64_t rows) {
    return attention.heads * (3 * ((rows + kLanes - 1) / kLanes * kLanes) + attention.dim);
  }

  PooledSequence(const PooledAttention& attention, int64_t index, float* scratch)
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

  // result (H, keys) = the product of each head of `with` (H, d) with that of the keys (part 0) or the values (1).
  void products(const Stored* with, int64_t part, float* result) const {
    const int64_t dim = attention.dim;
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t head = 0; head < attention.heads; ++head) {
        const Stored *one = with + head * dim, *two = pairs + (2 * key + part) * width + head * dim;
        Lanes products = {};
        for (int64_t i = 0; i < dim; i += kLanes) products += load(one + i) * load(two + i);
        result[head * padded + key] = sum(products);
      }
  }

  // out (H, d) = factor * numbers (H, keys) times the keys or the values.
  void weighted(const float* numbers, int64_t part, float factor, Stored* out) const {
    const int64_t dim = attention.dim;
    for (int64_t i = 0; i < width; i += kLanes) store(sums + i, Lanes{});
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t head = 0; head < attention.heads; ++head) {
        const Lanes number = splat(numbers[head * padded + key]);
        const Stored* from = pairs + (2 * key + part) * width + head * dim;
        float* to = sums + head * dim;
        for (int64_t i = 0; i < dim; i += kLanes) store(to + i, load(to + i) + number * load(from + i));
      }
    for (int64_t i = 0; i < width; i += kLanes) store(out + i, load(sums + i) * factor);
  }

  void drop() const {
    if (attention.dropout_p > 0)
      for (int64_t head = 0; head < attention.heads; ++head)
        for (int64_t i = head * padded; i < head * padded + keys; ++i) weights[i] *= factors[i];
  }
};

template <typename Stored>
void pooled_forward(const PooledAttention& attention, int64_t index, void* out, float* lse, float* scratch) {
  const PooledSequence<Stored> sequence(attention, index, scratch);
  const int64_t keys = sequence.keys;
  sequence.products(sequence.query, 0, sequence.weights);
  const auto factor = static_cast<float>(attention.scale) * kLog2E;
  for (int64_t head = 0; head < attention.heads; ++head) {
    float* const weights = sequence.weights + head * sequence.padded;
    float highest = -__builtin_inff();
    for (int64_t key = 0; key < keys; ++key) highest = weights[key] * factor > highest ? weights[key] * factor : highest;
    Lanes totals = {};
    for (int64_t key = 0; key < keys; key += kLanes) {
      const Lanes numbers = zero_from(exp2_of(load(weights + key) * factor - highest), keys - key);
      totals += numbers;
      store(weights + key, numbers);
    }
    const float total = sum(totals);
    for (int64_t key = 0; key < keys; ++key) weights[key] /= total;
    lse[index * attention.heads + head] = highest * kLn2 + __builtin_logf(total);
  }
  sequence.drop();
  sequence.weighted(sequence.weights, 1, 1.f, static_cast<Stored*>(out) + index * sequence.width);
}

template <typename Stored>
void pooled_backward(const PooledAttention& attention, const PooledAttentionGradient& gradient, int64_t index,
                     float* scratch) {
  const PooledSequence<Stored> sequence(attention, index, scratch);
  const int64_t heads = attention.heads, dim = attention.dim, keys = sequence.keys, width = sequence.width;
  const auto* out_grad = static_cast<const Stored*>(gradient.out_grad) + index * width;
  const auto* out = static_cast<const Stored*>(gradient.out) + index * width;
  const auto scale = static_cast<float>(attention.scale);
  sequence.products(sequence.query, 0, sequence.weights);
  sequence.products(out_grad, 1, sequence.grads);
  for (int64_t head = 0; head < heads; ++head) {
    Lanes products = {};
    for (int64_t i = head * dim; i < (head + 1) * dim; i += kLanes) products += load(out_grad + i) * load(out + i);
    const float delta = sum(products), lse = gradient.lse[index * heads + head] * kLog2E;
    for (int64_t i = head * sequence.padded; i < head * sequence.padded + keys; i += kLanes) {
      const Lanes weight = exp2_of(load(sequence.weights + i) * (scale * kLog2E) - lse);
      Lanes grad = load(sequence.grads + i);
      if (attention.dropout_p > 0) grad *= load(sequence.factors + i);
      store(sequence.weights + i, weight);
      store(sequence.grads + i, weight * (grad - delta));
    }
  }
  sequence.weighted(sequence.grads, 0, scale, static_cast<Stored*>(gradient.query_grad) + index * width);
  sequence.drop();
  Stored* to = static_cast<Stored*>(gradient.key_value_grad) + sequence.start * 2 * width;
  for (int64_t key = 0; key < keys; ++key, to += 2 * width)
    for (int64_t head = 0; head < heads; ++head) {
      const Lanes weight = splat(sequence.weights[head * sequence.padded + key]);
      const Lanes grad = splat(sequence.grads[head * sequence.padded + key] * scale);
      for (int64_t i = head * dim; i < (head + 1) * dim; i += kLanes) {
        store(to + i, grad * load(sequence.query + i));
        store(to + width + i, weight * load(out_grad + i));
      }
    }
  std::memset(to, 0, (sequence.end - sequence.start - keys) * 2 * width * sizeof(Stored));
}

}  // namespace
