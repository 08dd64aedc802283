#include "csrc/attention.h"

#include "attention_reference.h"

namespace checks {

namespace {

struct Case {
  const char* name;
  std::vector<int64_t> lengths;
  int64_t heads, dim;
  bool masked, causal;
  double dropout_p, scale;
};

// No length is a multiple of the vector length. The longest exceeds the 256 queries of a strip of
// the backward pass.
const std::vector<Case> kCases = {
    {"dense", {37, 37}, 3, 48, false, false, 0, 0.14},
    {"causal", {45}, 2, 16, false, true, 0, 0.25},
    {"masked", {41, 41, 41}, 2, 32, true, false, 0, 0.18},
    {"masked causal", {35, 35}, 1, 16, true, true, 0, 0.25},
    {"packed", {1, 70, 0, 33, 2}, 2, 64, false, false, 0, 0.125},
    {"packed dropout", {19, 1, 66}, 3, 16, false, false, 0.1, 0.25},
    {"causal dropout", {67}, 1, 48, false, true, 0.37, 0.14},
    {"long", {301}, 1, 16, false, false, 0, 0.25},
    {"long causal", {5, 290}, 1, 16, false, true, 0, 0.25},
    {"large scores", {39}, 1, 32, false, false, 0, 12},
};

template <typename Stored>
void check(const Case& of) {
  const std::string name = "attention " + name_of<Stored>() + " " + of.name;
  std::vector<int32_t> bounds = {0};
  for (const int64_t length : of.lengths)
    bounds.push_back(bounds.back() + static_cast<int32_t>(length));
  const int64_t rows = bounds.back(), heads = of.heads, dim = of.dim, width = heads * dim;
  Random random(rows * 131 + dim);
  const Buffer<Stored> qkv(rows * 3 * width, random, -1.7, 1.7),
      out_grad(rows * width, random, -1.7, 1.7);
  std::vector<uint8_t> mask(rows, 1);
  // One sequence has no visible key, and the others have random ones.
  for (int64_t i = 0; of.masked && i < rows; ++i)
    mask[i] = of.lengths.size() == 3 && i < bounds[1] ? 0 : random.below(4) != 0;
  const uint64_t seed = 0x9876543210ABCDEF;
  const Attention attention = {instruction_set,
                               qkv.data(),
                               sizeof(Stored) == 2,
                               rows,
                               heads,
                               dim,
                               bounds.data(),
                               static_cast<int64_t>(of.lengths.size()),
                               of.masked ? mask.data() : nullptr,
                               of.causal,
                               of.scale,
                               of.dropout_p,
                               seed};

  Buffer<Stored> out(rows * width), again(rows * width);
  Buffer<float> lse(heads * rows), lse_again(heads * rows);
  attention_forward(attention, out.data(), lse.data(), 1);
  attention_forward(attention, again.data(), lse_again.data(), kThreads);
  expect(name + ": forward is the same on more threads",
         out.same_bits(again) && lse.same_bits(lse_again));
  expect(name + ": forward stays inside its outputs", out.intact() && lse.intact());
  Buffer<Stored> grad(rows * 3 * width), grad_again(rows * 3 * width);
  const AttentionGradient gradient = {out_grad.data(), out.data(), lse.data(), grad.data()};
  const AttentionGradient threaded = {out_grad.data(), out.data(), lse.data(), grad_again.data()};
  attention_backward(attention, gradient, 1);
  attention_backward(attention, threaded, kThreads);
  expect(name + ": backward is the same on more threads", grad.same_bits(grad_again));
  expect(name + ": backward stays inside its output", grad.intact());

  // The backward pass is checked as a function of the forward pass's actual results.
  const std::vector<double> inputs = exact(qkv), upstream = exact(out_grad);
  std::vector<double> given_out(out.size());
  for (int64_t i = 0; i < out.size(); ++i) given_out[i] = value_of(out[i]);
  Gradient expected(rows * 3 * width);
  for (size_t sequence = 0; sequence < of.lengths.size(); ++sequence) {
    const int64_t start = bounds[sequence], end = bounds[sequence + 1];
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t row = start; row < end; ++row) {
        const auto place = [&](int64_t at, int64_t part) {
          return (at * 3 + part) * width + head * dim;
        };
        Query query = {inputs.data() + place(row, 0), {}, {}, {}, dim, of.scale};
        std::vector<int64_t> key_to, value_to;
        for (int64_t key = start; key < (of.causal ? row + 1 : end); ++key) {
          if (!mask[key]) continue;
          key_to.push_back(place(key, 1));
          value_to.push_back(place(key, 2));
          query.keys.push_back(inputs.data() + key_to.back());
          query.values.push_back(inputs.data() + value_to.back());
          query.factors.push_back(dropout_factor(of.dropout_p, seed, row, head, key - start));
        }
        const Forward truth = forward(query);
        for (int64_t i = 0; i < dim; ++i)
          compare(name + ": out", value_of(out[row * width + head * dim + i]), truth.out[i],
                  truth.out_bound[i] + unit_of<Stored>() * std::abs(truth.out[i]));
        compare(name + ": lse", lse[head * rows + row], truth.lse, truth.lse_bound);
        backward(query, upstream.data() + row * width + head * dim,
                 given_out.data() + row * width + head * dim, lse[head * rows + row], end - start,
                 expected, place(row, 0), expected, key_to, expected, value_to);
      }
    }
  }
  const char* const parts[] = {": query grad", ": key grad", ": value grad"};
  for (int64_t i = 0; i < grad.size(); ++i)
    compare(name + parts[i / width % 3], value_of(grad[i]), expected.value[i],
            expected.bound[i] + unit_of<Stored>() * std::abs(expected.value[i]));
}

void check_nan() {
  const std::vector<int32_t> bounds = {0, 35};
  Random random(5);
  Buffer<float> qkv(35 * 3 * 16, random, -1, 1), out(35 * 16), lse(35);
  qkv[34 * 3 * 16 + 5] = std::nanf("");  // a query
  const Attention attention = {instruction_set, qkv.data(), false, 35, 1, 16, bounds.data(), 1,
                               nullptr,         false,      0.25,  0,  0};
  attention_forward(attention, out.data(), lse.data(), 1);
  bool others = true;
  for (int64_t i = 0; i < 34 * 16; ++i) others = others && std::isfinite(out[i]);
  expect("attention: NaN in a query stays in its row",
         others && std::isnan(out[34 * 16]) && std::isnan(lse[34]));
}

void check_refusals() {
  const std::vector<int32_t> bounds = {0, 2}, falling = {0, 3, 2};
  Buffer<float> qkv(2 * 3 * 16), out(2 * 16), lse(2);
  Attention attention = {instruction_set, qkv.data(), false, 2, 1, 16, bounds.data(), 1,
                         nullptr,         false,      1,     0, 0};
  const auto run = [&] { attention_forward(attention, out.data(), lse.data(), kThreads); };
  attention.instruction_set = "sse9";
  expect_refusal("attention: an unknown instruction set is refused", run);
  attention.instruction_set = instruction_set;
  attention.dim = 24;
  expect_refusal("attention: a head dimension of 24 is refused", run);
  attention.dim = 16;
  attention.rows = 3;
  expect_refusal("attention: bounds that end early are refused", run);
  attention.rows = 2;
  attention.bounds = falling.data();
  attention.sequences = 2;
  expect_refusal("attention: falling bounds are refused", run);
}

}  // namespace

void check_attention() {
  for_each_dtype(kCases, [](const Case& of, auto stored) { check<decltype(stored)>(of); });
  check_nan();
  check_refusals();
}

}  // namespace checks
