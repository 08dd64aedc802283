#include "csrc/pointwise.h"

#include "checks.h"

namespace checks {

namespace {

template <typename Stored>
Values values(const Buffer<Stored>& buffer) {
  return {const_cast<Stored*>(buffer.data()), sizeof(Stored) == 2};
}

constexpr Values kNothing = {nullptr, false};
constexpr double kEps = 1e-5;

struct Case {
  const char* name;
  int64_t rows, columns;
  double mean;
  bool with_branch, with_dropout;
};

// More than 32 rows are several tasks. No number of columns is a multiple of the vector length.
const std::vector<Case> kCases = {
    {"plain", 70, 37, 0.5, false, false},
    {"branch", 33, 77, 0, true, false},
    {"dropout", 67, 101, 0, true, true},
    {"narrow", 3, 5, 8, true, false},
};

// The mean and deviation of a row, and bounds on the error of (s - mean) / sqrt(var + eps) in
// float.
struct Moments {
  Moments(const double* row, int64_t columns) {
    const double count = static_cast<double>(columns);
    double size = 0, squares = 0;
    for (int64_t j = 0; j < columns; ++j) {
      mean += row[j] / count;
      size += std::abs(row[j]) / count;
    }
    for (int64_t j = 0; j < columns; ++j) squares += (row[j] - mean) * (row[j] - mean) / count;
    inverse = 1 / std::sqrt(squares + kEps);
    mean_error = (count + 1) * kUnit * size;
    // Half of the relative error of the variance: that of a sum of squares, plus that from the
    // error of the mean.
    inverse_error = ((count + 4) / 2 + 2) * kUnit + mean_error * inverse +
                    0.5 * std::pow(mean_error * inverse, 2);
  }

  double normal(double s) const { return (s - mean) * inverse; }
  double normal_error(double s) const {
    return inverse * mean_error + std::abs(normal(s)) * (inverse_error + 3 * kUnit);
  }

  double mean = 0, inverse, mean_error, inverse_error;
};

double keep(const Dropout& dropout, int64_t row, int64_t column) {
  if (dropout.drop_below == 0) return 1;
  const uint32_t word =
      philox(dropout.seed, static_cast<uint32_t>(column), static_cast<uint32_t>(row), 0);
  return word < dropout.drop_below ? 0 : value_of(dropout.kept);
}

template <typename Stored>
void check_add_norm(const Case& of) {
  const std::string name = "add_norm " + name_of<Stored>() + " " + of.name;
  const int64_t rows = of.rows, columns = of.columns, size = rows * columns;
  Random random(size);
  const Buffer<Stored> stream(size, random, of.mean - 2, of.mean + 2), branch(size, random, -1, 1);
  const Buffer<float> weight(columns, random, 0.5, 1.5), bias(columns, random, -1, 1);
  const Dropout dropout =
      of.with_dropout ? Dropout{0xFEDCBA9876543210, 0x30000000, 1 / 0.8125f} : Dropout{0, 0, 1};

  struct Outputs {
    explicit Outputs(int64_t size) : total(size), normed(size), wide(size) {}
    Buffer<Stored> total, normed;
    Buffer<float> wide;
  } result(size), again(size);
  const auto run = [&](Outputs& to, int threads) {
    const AddNorm norm = {rows,
                          columns,
                          values(stream),
                          of.with_branch ? values(branch) : kNothing,
                          values(weight),
                          values(bias),
                          of.with_branch ? values(to.total) : kNothing,
                          values(to.normed),
                          values(to.wide),
                          kEps,
                          dropout};
    add_norm(norm, threads);
  };
  run(result, 1);
  run(again, kThreads);
  const bool same = result.total.same_bits(again.total) && result.normed.same_bits(again.normed);
  expect(name + ": the same on more threads", same && result.wide.same_bits(again.wide));
  expect(name + ": stays inside its outputs",
         result.total.intact() && result.normed.intact() && result.wide.intact());

  const std::vector<double> streams = exact(stream), branches = exact(branch);
  const std::vector<double> weights = exact(weight), biases = exact(bias);
  if (of.with_branch)
    for (int64_t i = 0; i < size; ++i) {
      const double added = keep(dropout, i / columns, i % columns) * branches[i],
                   truth = streams[i] + added;
      compare(name + ": total", value_of(result.total[i]), truth,
              kUnit * (std::abs(added) + std::abs(truth)) + unit_of<Stored>() * std::abs(truth));
    }
  // The kernel normalises the sum after it is rounded to memory.
  const std::vector<double> totals = exact(of.with_branch ? result.total : stream);
  for (int64_t row = 0; row < rows; ++row) {
    const Moments moments(totals.data() + row * columns, columns);
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t i = row * columns + j;
      const double scaled = moments.normal(totals[i]) * weights[j], truth = scaled + biases[j];
      const double bound = std::abs(weights[j]) * moments.normal_error(totals[i]) +
                           kUnit * (std::abs(scaled) + std::abs(truth));
      compare(name + ": normed", value_of(result.normed[i]), truth,
              bound + unit_of<Stored>() * std::abs(truth));
      // In float throughout: no rounding of the storage can hide an error here.
      compare(name + ": wide", value_of(result.wide[i]), truth, bound);
    }
  }
}

template <typename Stored>
void check_add_norm_backward(const Case& of) {
  const std::string name = "add_norm backward " + name_of<Stored>() + " " + of.name;
  const int64_t rows = of.rows, columns = of.columns, size = rows * columns;
  Random random(size + 1);
  const Buffer<Stored> total(size, random, of.mean - 2, of.mean + 2), grad(size, random, -1, 1);
  const Buffer<Stored> total_grad(size, random, -1, 1);
  const Buffer<float> wide_grad(size, random, -1, 1), weight(columns, random, 0.5, 1.5);
  const Dropout dropout =
      of.with_dropout ? Dropout{0xFEDCBA9876543210, 0x30000000, 1 / 0.8125f} : Dropout{0, 0, 1};

  struct Outputs {
    Outputs(int64_t size, int64_t columns)
        : stream(size), branch(size), weight(columns), bias(columns) {}
    Buffer<Stored> stream, branch;
    Buffer<float> weight, bias;
  } result(size, columns), again(size, columns);
  const auto run = [&](Outputs& to, int threads) {
    const AddNormGradient gradient = {rows,
                                      columns,
                                      values(grad),
                                      values(wide_grad),
                                      of.with_branch ? values(total_grad) : kNothing,
                                      values(total),
                                      values(weight),
                                      values(to.stream),
                                      of.with_branch ? values(to.branch) : kNothing,
                                      to.weight.data(),
                                      to.bias.data(),
                                      kEps,
                                      dropout};
    add_norm_backward(gradient, threads);
  };
  run(result, 1);
  run(again, kThreads);
  expect(name + ": the same on more threads",
         result.stream.same_bits(again.stream) && result.branch.same_bits(again.branch) &&
             result.weight.same_bits(again.weight) && result.bias.same_bits(again.bias));
  expect(name + ": stays inside its outputs", result.stream.intact() && result.branch.intact() &&
                                                  result.weight.intact() && result.bias.intact());

  const std::vector<double> totals = exact(total), grads = exact(grad),
                            wide_grads = exact(wide_grad);
  const std::vector<double> total_grads = exact(total_grad), weights = exact(weight);
  const double count = static_cast<double>(columns), tasks = static_cast<double>(rows + 3);
  std::vector<double> weight_grad(columns), weight_bound(columns), bias_grad(columns),
      bias_bound(columns);
  for (int64_t row = 0; row < rows; ++row) {
    const Moments moments(totals.data() + row * columns, columns);
    // For h, and for h x.
    double mean = 0, mean_size = 0, along = 0, along_size = 0, along_error = 0;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t i = row * columns + j;
      const double g = grads[i] + wide_grads[i], h = g * weights[j];
      const double x = moments.normal(totals[i]), x_error = moments.normal_error(totals[i]);
      mean += h / count;
      mean_size += std::abs(h) / count;
      along += h * x / count;
      along_size += std::abs(h * x) / count;
      along_error += std::abs(h) * x_error / count;
      weight_grad[j] += g * x;
      weight_bound[j] += std::abs(g) * x_error + tasks * kUnit * std::abs(g * x);
      bias_grad[j] += g;
      bias_bound[j] += tasks * kUnit * std::abs(g);
    }
    const double mean_error = (count + 3) * kUnit * mean_size;
    along_error += (count + 4) * kUnit * along_size;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t i = row * columns + j;
      const double h = (grads[i] + wide_grads[i]) * weights[j], x = moments.normal(totals[i]);
      const double inner = (h - mean - x * along) * moments.inverse;
      const double inner_size =
          (std::abs(h) + mean_size + std::abs(x) * along_size) * moments.inverse;
      double bound = moments.inverse * (mean_error + moments.normal_error(totals[i]) * along_size +
                                        std::abs(x) * along_error) +
                     inner_size * (moments.inverse_error + 6 * kUnit);
      double truth = inner;
      if (of.with_branch) {
        truth += total_grads[i];
        bound += kUnit * std::abs(truth);
      }
      compare(name + ": stream grad", value_of(result.stream[i]), truth,
              bound + unit_of<Stored>() * std::abs(truth));
      if (!of.with_branch) continue;
      const double factor = keep(dropout, row, j);
      compare(name + ": branch grad", value_of(result.branch[i]), factor * truth,
              factor * (bound + (kUnit + unit_of<Stored>()) * std::abs(truth)));
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    compare(name + ": weight grad", result.weight[j], weight_grad[j], weight_bound[j]);
    compare(name + ": bias grad", result.bias[j], bias_grad[j], bias_bound[j]);
  }
}

// The kernels compute Phi(x) by Abramowitz and Stegun's 7.1.26 in float: a polynomial of degree 5
// in t = 1 / (1 + c |x|), times a density. Its absolute error is 1.5e-7 for erf, and so half of
// that for Phi.
struct Normal {
  explicit Normal(double x)
      : below(std::erfc(-x / std::sqrt(2.0)) / 2), density(std::exp(-x * x / 2)) {
    constexpr double factors[] = {0.254829592, 0.284496736, 1.421413741, 1.453152027, 1.061405429};
    const double t = 1 / (1 + 0.3275911 / std::sqrt(2.0) * std::abs(x));
    double sizes = 0, slopes = 0, power = t;
    for (int i = 0; i < 5; ++i, power *= t) {
      sizes += factors[i] * power;
      slopes += (i + 1) * factors[i] * power;
    }
    density_error = kExp + (x * x / 2 + 2) * kUnit;
    const double tail = std::min(below, 1 - below);
    below_error =
        0.75e-7 + 0.5 * density * (12 * sizes + 3 * slopes) * kUnit + tail * density_error + kUnit;
  }

  // The density times sqrt(2 pi), and its relative error.
  double below, density, density_error, below_error;
};

template <typename Stored>
void check_gelu() {
  const std::string name = "gelu " + name_of<Stored>();
  const int64_t count = 16384 + 1037;  // two tasks
  Random random(7);
  Buffer<Stored> x(count, random, -7, 7);
  const Buffer<Stored> grad(count, random, -2, 2);
  const double special[] = {0, 100, -100, 1e-20, -1e-3, 12.5, -12.5, 1e19};
  for (int64_t i = 0; i < 8; ++i) x[i * 11] = stored<Stored>(special[i]);
  Buffer<Stored> out(count), out_again(count), in_grad(count), in_grad_again(count);
  gelu(values(x), values(out), count, 1);
  gelu(values(x), values(out_again), count, kThreads);
  gelu_backward(values(grad), values(x), values(in_grad), count, 1);
  gelu_backward(values(grad), values(x), values(in_grad_again), count, kThreads);
  expect(name + ": the same on more threads",
         out.same_bits(out_again) && in_grad.same_bits(in_grad_again));
  expect(name + ": stays inside its outputs", out.intact() && in_grad.intact());

  const std::vector<double> numbers = exact(x), upstream = exact(grad);
  constexpr double root = 0.3989422804014327;  // 1 / sqrt(2 pi)
  for (int64_t i = 0; i < count; ++i) {
    const Normal at(numbers[i]);
    const double truth = numbers[i] * at.below;
    compare(name + ": out", value_of(out[i]), truth,
            std::abs(numbers[i]) * at.below_error + (unit_of<Stored>() + kUnit) * std::abs(truth));
    const double slope = numbers[i] * at.density * root, result = upstream[i] * (at.below + slope);
    compare(name + ": grad", value_of(in_grad[i]), result,
            std::abs(upstream[i]) *
                    (at.below_error + std::abs(slope) * (at.density_error + 3 * kUnit)) +
                (unit_of<Stored>() + 2 * kUnit) * std::abs(result));
  }
}

// Rounding to bfloat16 makes a NaN quiet, and keeps its sign and the upper bits of its payload.
void check_nan() {
  constexpr uint32_t bits[] = {0x7FA12345, 0xFFA12345, 0x7F800001, 0x7FFFFFFF, 0xFFC00000};
  constexpr uint16_t rounded[] = {0x7FE1, 0xFFE1, 0x7FC0, 0x7FFF, 0xFFC0};
  constexpr int64_t columns = 20;  // a whole vector and a part of one
  Buffer<float> stream(columns), branch(columns), weight(columns), bias(columns), normed(columns);
  Buffer<uint16_t> total(columns);
  for (int64_t i = 0; i < columns; ++i) std::memcpy(&stream[i], &bits[i % 5], sizeof(float));
  for (Buffer<float>* buffer : {&branch, &weight, &bias}) buffer->fill(0);
  add_norm(AddNorm{1,
                   columns,
                   values(stream),
                   values(branch),
                   values(weight),
                   values(bias),
                   values(total),
                   values(normed),
                   kNothing,
                   kEps,
                   {0, 0, 1}},
           1);
  bool kept = true;
  for (int64_t i = 0; i < columns; ++i) kept = kept && total[i] == rounded[i % 5];
  expect("add_norm bf16: NaN keeps its sign and payload", kept);
}

void check_refusals() {
  Buffer<float> x(4);
  expect_refusal("pointwise: a negative size is refused",
                 [&] { gelu(values(x), values(x), -1, 1); });
}

}  // namespace

void check_pointwise() {
  for_each_dtype(kCases, [](const Case& of, auto stored) {
    check_add_norm<decltype(stored)>(of);
    check_add_norm_backward<decltype(stored)>(of);
  });
  check_gelu<float>();
  check_gelu<uint16_t>();
  check_nan();
  check_refusals();
}

}  // namespace checks
