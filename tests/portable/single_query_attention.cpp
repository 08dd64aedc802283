#include "csrc/single_query_attention.h"

#include "attention_reference.h"

namespace checks {

namespace {

struct Case {
  const char* name;
  std::vector<int64_t> lengths, rows;  // rows count within their sequence
  int64_t heads, dim;
  bool causal;
  double dropout_p;
};

const std::vector<Case> kCases = {
    {"first row", {37, 1, 70}, {0, 0, 0}, 3, 48, false, 0},
    {"causal", {45, 33}, {44, 20}, 2, 16, true, 0},
    {"dropout", {39, 66}, {3, 65}, 2, 32, false, 0.2},
    {"causal dropout", {67}, {50}, 1, 64, true, 0.37},
};

template <typename Stored>
void check(const Case& of) {
  const std::string name = "single-query attention " + name_of<Stored>() + " " + of.name;
  const auto sequences = static_cast<int64_t>(of.lengths.size());
  const int64_t heads = of.heads, dim = of.dim, width = heads * dim;
  std::vector<int32_t> bounds = {0};
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < sequences; ++i) {
    rows.push_back(bounds.back() + of.rows[i]);
    bounds.push_back(bounds.back() + static_cast<int32_t>(of.lengths[i]));
  }
  const int64_t tokens = bounds.back();
  Random random(tokens * 17 + dim);
  const Buffer<Stored> query(sequences * width, random, -1.7, 1.7),
      pairs(tokens * 2 * width, random, -1.7, 1.7);
  const Buffer<Stored> out_grad(sequences * width, random, -1.7, 1.7);
  const double scale = 0.2;
  const uint64_t seed = 0x123456789ABCDEF0;
  const SingleQueryAttention attention = {
      instruction_set, query.data(), pairs.data(),  sizeof(Stored) == 2, tokens,    sequences,
      heads,           dim,          bounds.data(), rows.data(),         of.causal, scale,
      of.dropout_p,    seed};

  Buffer<Stored> out(sequences * width), out_again(sequences * width);
  Buffer<float> lse(sequences * heads), lse_again(sequences * heads);
  single_query_attention_forward(attention, out.data(), lse.data(), 1);
  single_query_attention_forward(attention, out_again.data(), lse_again.data(), kThreads);
  expect(name + ": forward is the same on more threads",
         out.same_bits(out_again) && lse.same_bits(lse_again));
  expect(name + ": forward stays inside its outputs", out.intact() && lse.intact());
  Buffer<Stored> query_grad(sequences * width), pairs_grad(tokens * 2 * width);
  Buffer<Stored> query_again(sequences * width), pairs_again(tokens * 2 * width);
  const auto run = [&](Buffer<Stored>& to_query, Buffer<Stored>& to_pairs, int threads) {
    const SingleQueryAttentionGradient gradient = {out_grad.data(), out.data(), lse.data(),
                                                   to_query.data(), to_pairs.data()};
    single_query_attention_backward(attention, gradient, threads);
  };
  run(query_grad, pairs_grad, 1);
  run(query_again, pairs_again, kThreads);
  expect(name + ": backward is the same on more threads",
         query_grad.same_bits(query_again) && pairs_grad.same_bits(pairs_again));
  expect(name + ": backward stays inside its outputs", query_grad.intact() && pairs_grad.intact());

  const std::vector<double> queries = exact(query), keys_values = exact(pairs),
                            upstream = exact(out_grad);
  std::vector<double> given_out(out.size());
  for (int64_t i = 0; i < out.size(); ++i) given_out[i] = value_of(out[i]);
  Gradient expected_query(query_grad.size()), expected_pairs(pairs_grad.size());
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t start = bounds[sequence],
                  end = of.causal ? rows[sequence] + 1 : bounds[sequence + 1];
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = sequence * width + head * dim;
      Query seen = {queries.data() + at, {}, {}, {}, dim, scale};
      std::vector<int64_t> key_to, value_to;
      for (int64_t key = start; key < end; ++key) {
        key_to.push_back(2 * key * width + head * dim);
        value_to.push_back((2 * key + 1) * width + head * dim);
        seen.keys.push_back(keys_values.data() + key_to.back());
        seen.values.push_back(keys_values.data() + value_to.back());
        seen.factors.push_back(
            dropout_factor(of.dropout_p, seed, rows[sequence], head, key - start));
      }
      const Forward truth = forward(seen);
      for (int64_t i = 0; i < dim; ++i)
        compare(name + ": out", value_of(out[at + i]), truth.out[i],
                truth.out_bound[i] + unit_of<Stored>() * std::abs(truth.out[i]));
      const float given_lse = lse[sequence * heads + head];
      compare(name + ": lse", given_lse, truth.lse, truth.lse_bound);
      backward(seen, upstream.data() + at, given_out.data() + at, given_lse, end - start,
               expected_query, at, expected_pairs, key_to, expected_pairs, value_to);
    }
  }
  const auto compare_all = [&](const std::string& what, const Buffer<Stored>& result,
                               const Gradient& expected, const auto& is_part) {
    for (int64_t i = 0; i < result.size(); ++i)
      if (is_part(i))
        compare(name + what, value_of(result[i]), expected.value[i],
                expected.bound[i] + unit_of<Stored>() * std::abs(expected.value[i]));
  };
  compare_all(": query grad", query_grad, expected_query, [](int64_t) { return true; });
  compare_all(": key grad", pairs_grad, expected_pairs,
              [&](int64_t i) { return i / width % 2 == 0; });
  compare_all(": value grad", pairs_grad, expected_pairs,
              [&](int64_t i) { return i / width % 2 == 1; });
}

void check_refusals() {
  const std::vector<int32_t> bounds = {0, 2};
  const std::vector<int64_t> outside = {2};
  Buffer<float> query(16), pairs(2 * 2 * 16), out(16), lse(1);
  const SingleQueryAttention attention = {
      instruction_set, query.data(),   pairs.data(), false, 2, 1, 1, 16,
      bounds.data(),   outside.data(), false,        1,     0, 0};
  expect_refusal("single-query attention: a row outside its sequence is refused",
                 [&] { single_query_attention_forward(attention, out.data(), lse.data(), 1); });
}

}  // namespace

void check_single_query_attention() {
  for_each_dtype(kCases, [](const Case& of, auto stored) { check<decltype(stored)>(of); });
  check_refusals();
}

}  // namespace checks
