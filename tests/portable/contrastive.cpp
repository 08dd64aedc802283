#include "csrc/contrastive.h"

#include "csrc/cpu/simd/isa.h"

#include "checks.h"

namespace checks {

namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kNoPositives = int64_t{1} << 40;

// There are `kGap` floats between rows of dot products, which no kernel may touch.
constexpr int64_t kGap = 5;

struct Case {
  const char* name;
  int64_t rows, columns, first;
  double scale;
  bool spread;  // log-sum-exps are so far apart that rows and columns need separate exponentials
};

// More than 512 columns are two tiles, and more than 256 rows are two sums of columns.
const std::vector<Case> kCases = {
    {"two tiles", 37, 531, 3, 10, false}, {"many rows", 261, 19, -250, 30, false},
    {"small", 5, 7, 0, 100, false},       {"without positives", 6, 35, kNoPositives, 50, false},
    {"spread", 23, 41, 7, 100, true},
};

struct Dots {
  explicit Dots(const Case& of) : Dots(of, of.rows * 1009 + of.columns) {}

  Block block() { return {numbers.data(), columns + kGap, rows, columns, first}; }

  bool gap_intact() const {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = columns; i < columns + kGap; ++i)
        if (!std::isnan(numbers[row * (columns + kGap) + i])) return false;
    return numbers.intact();
  }

  float at(int64_t row, int64_t column) const { return numbers[row * (columns + kGap) + column]; }

  int64_t rows, columns, first;
  Buffer<float> numbers;

 private:
  Dots(const Case& of, uint64_t seed)
      : rows(of.rows),
        columns(of.columns),
        first(of.first),
        numbers(of.rows * (of.columns + kGap)) {
    Random random(seed);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column) {
        const double x = random.uniform(-1, 1);
        const bool low = of.spread && (row % 3 == 0 || column % 4 == 0);
        numbers[row * (columns + kGap) + column] = static_cast<float>(low ? -0.9 + 0.1 * x : x);
      }
  }
};

// The reference's view: (rows, columns) without gaps.
std::vector<double> exact_dots(const Dots& dots) {
  Buffer<float> dense(dots.rows * dots.columns);
  for (int64_t i = 0; i < dense.size(); ++i) dense[i] = dots.at(i / dots.columns, i % dots.columns);
  return exact(dense);
}

bool is_positive(const Dots& dots, int64_t row, int64_t column) {
  return column == dots.first + row;
}

void check_sums(const Case& of) {
  const std::string name = std::string("contrastive sums fp32 ") + of.name;
  Dots dots(of);
  const double factor = of.scale * kLog2E;
  const auto offset = static_cast<float>(std::rint(factor - 100));
  Buffer<float> rows(of.rows), rows_again(of.rows);
  Buffer<double> columns(of.columns), columns_again(of.columns);
  columns.fill(0.25);
  columns_again.fill(0.25);
  exponential_sums(dots.block(), factor, offset, Sums{rows.data(), columns.data()}, 1);
  exponential_sums(dots.block(), factor, offset, Sums{rows_again.data(), columns_again.data()},
                   kThreads);
  expect(name + ": the same on more threads",
         rows.same_bits(rows_again) && columns.same_bits(columns_again));
  expect(name + ": stays inside its outputs",
         rows.intact() && columns.intact() && dots.gap_intact());

  const std::vector<double> x = exact_dots(dots);
  std::vector<double> row_sums(of.rows), column_sums(of.columns, 0.25);
  for (int64_t row = 0; row < of.rows; ++row)
    for (int64_t column = 0; column < of.columns; ++column) {
      if (is_positive(dots, row, column)) continue;
      const double power =
          std::exp2(factor * x[row * of.columns + column] - static_cast<double>(offset));
      row_sums[row] += power;
      column_sums[column] += power;
    }
  // All terms are positive. Sums in float have at most 512 terms of a row and 256 of a column.
  // Powers below 2^-126 become 0.
  const auto bound = [](double sum, int64_t terms, int64_t in_float) {
    return (kExp + static_cast<double>(std::min(terms, in_float) + 2) * kUnit) * sum +
           static_cast<double>(terms) * 0x1p-126;
  };
  for (int64_t row = 0; row < of.rows; ++row)
    compare(name + ": rows", rows[row], row_sums[row], bound(row_sums[row], of.columns, 512));
  for (int64_t column = 0; column < of.columns; ++column)
    compare(name + ": columns", columns[column], column_sums[column],
            bound(column_sums[column], of.rows, 256));
}

// Log-sum-exps of rows and columns, from the kernel's inputs.
void log_sums(const Dots& dots, double scale, std::vector<double>& rows,
              std::vector<double>& columns) {
  rows.assign(dots.rows, 0);
  columns.assign(dots.columns, 0);
  for (int64_t row = 0; row < dots.rows; ++row)
    for (int64_t column = 0; column < dots.columns; ++column) {
      const double power = std::exp(scale * value_of(dots.at(row, column)));
      rows[row] += power;
      columns[column] += power;
    }
  for (double& sum : rows) sum = std::log(sum);
  for (double& sum : columns) sum = std::log(sum);
}

struct Ids {
  Ids(int64_t rows, int64_t columns, Random& random) : rows(rows), columns(columns) {
    for (int32_t& id : this->rows) id = static_cast<int32_t>(random.below(5));
    for (int32_t& id : this->columns) id = static_cast<int32_t>(random.below(5));
  }

  std::vector<int32_t> rows, columns;
};

void check_softmax_gradient(const Case& of, bool grouped) {
  const std::string name =
      std::string("softmax gradient fp32 ") + (grouped ? "groups " : "") + of.name;
  Case with = of;
  if (grouped) with.first = kNoPositives;
  Dots dots(with), again(with);
  Random random(99);
  std::vector<double> rows_lse, columns_lse;
  log_sums(dots, of.scale, rows_lse, columns_lse);
  rows_lse[2] = kInfinity;
  const Buffer<float> positive_grad(of.rows, random, -1, 0), row_shares(of.rows, random, 0, 1);
  const Buffer<float> column_shares(of.columns, random, 0, 1);
  const Ids ids(of.rows, of.columns, random);
  const double weight = 0.375;
  Softmax softmax = {of.scale,
                     weight,
                     rows_lse.data(),
                     columns_lse.data(),
                     with.first == kNoPositives ? nullptr : positive_grad.data(),
                     {}};
  if (grouped)
    softmax.groups = {ids.rows.data(), ids.columns.data(), row_shares.data(), column_shares.data()};
  const std::vector<double> x = exact_dots(dots), at_positives = exact(positive_grad);
  softmax_gradient(dots.block(), softmax, 1);
  softmax_gradient(again.block(), softmax, kThreads);
  expect(name + ": the same on more threads", dots.numbers.same_bits(again.numbers));
  expect(name + ": stays inside its output", dots.gap_intact());

  for (int64_t row = 0; row < of.rows; ++row)
    for (int64_t column = 0; column < of.columns; ++column) {
      const double logit = of.scale * x[row * of.columns + column];
      const double powers =
          weight * (std::exp(logit - rows_lse[row]) + std::exp(logit - columns_lse[column]));
      double truth = powers, shares = 0;
      if (is_positive(dots, row, column)) {
        compare(name + ": positives", dots.at(row, column), at_positives[row], 0);
        continue;
      }
      if (grouped && ids.rows[row] == ids.columns[column])
        shares = value_of(row_shares[row]) + value_of(column_shares[column]);
      truth -= shares;
      // Rounding: a share, a product and a sum of powers, then a sum of shares and a difference.
      // Powers below 2^-126 become 0.
      const double bound = (kExp + 4 * kUnit) * powers + 2 * kUnit * shares + weight * 0x1p-125;
      compare(name + ": gradient", dots.at(row, column), truth, bound);
    }
}

void check_sigmoid(const Case& of, bool grouped) {
  const std::string name = std::string("sigmoid fp32 ") + (grouped ? "groups " : "") + of.name;
  Case with = of;
  if (grouped) with.first = kNoPositives;
  Dots dots(with), again(with), unchanged(with);
  Random random(98);
  const Ids ids(of.rows, of.columns, random);
  Sigmoid sigmoid = {of.scale, -0.4 * of.scale, 0.0625, true, {}};
  if (grouped) sigmoid.groups = {ids.rows.data(), ids.columns.data(), nullptr, nullptr};
  const std::vector<double> x = exact_dots(dots);
  const SigmoidSums sums = sigmoid_gradient(dots.block(), sigmoid, 1);
  const SigmoidSums sums_again = sigmoid_gradient(again.block(), sigmoid, kThreads);
  expect(name + ": the same on more threads", dots.numbers.same_bits(again.numbers) &&
                                                  sums.loss == sums_again.loss &&
                                                  sums.gradient == sums_again.gradient);
  expect(name + ": stays inside its output", dots.gap_intact());
  sigmoid.with_gradients = false;
  const Dots before(with);
  const SigmoidSums loss_only = sigmoid_gradient(unchanged.block(), sigmoid, 1);
  expect(name + ": without gradients the products do not change",
         unchanged.numbers.same_bits(before.numbers));
  expect(name + ": without gradients the loss is the same", loss_only.loss == sums.loss);

  double loss = 0, loss_bound = 0, total = 0, total_bound = 0;
  const double terms = static_cast<double>(std::min<int64_t>(of.columns, 512) + 2) * kUnit;
  for (int64_t row = 0; row < of.rows; ++row)
    for (int64_t column = 0; column < of.columns; ++column) {
      const bool positive =
          grouped ? ids.rows[row] == ids.columns[column] : is_positive(dots, row, column);
      const double product = sigmoid.scale * x[row * of.columns + column];
      const double z = (positive ? -1 : 1) * (product + sigmoid.bias);
      const double logit_error = (3 * std::abs(product) + 2 * std::abs(sigmoid.bias)) * kUnit;
      const double soft = std::max(z, 0.0) + std::log1p(std::exp(-std::abs(z)));
      const double chance = z > 0 ? 1 / (1 + std::exp(-z)) : std::exp(z) / (1 + std::exp(z));
      const double gradient = (positive ? -1 : 1) * sigmoid.weight * chance;
      // The exponential, a logarithm of the same accuracy, and their sum. An error of the logit
      // changes log(1 + u) by at most `chance` times as much.
      loss += soft;
      loss_bound += logit_error * chance + (2 * kExp + 2 * kUnit + terms) * soft;
      const double bound =
          std::abs(gradient) * (logit_error + kExp + 6 * kUnit) + sigmoid.weight * 0x1p-125;
      total += gradient;
      total_bound += bound + std::abs(gradient) * terms;
      compare(name + ": gradient", dots.at(row, column), gradient, bound);
    }
  compare(name + ": loss", sums.loss, loss, loss_bound);
  compare(name + ": sum of the gradient", sums.gradient, total, total_bound);
}

void check_nan() {
  Dots dots({"", 3, 21, kNoPositives, 1, false});
  dots.numbers[4] = std::nanf("");
  const Sigmoid sigmoid = {1, 0, 1, false, {}};
  expect("sigmoid: NaN reaches the loss",
         std::isnan(sigmoid_gradient(dots.block(), sigmoid, 1).loss));
}

void check_refusals() {
  Dots dots({"", 3, 4, 0, 1, false});
  Buffer<float> rows(3);
  Buffer<double> columns(4);
  Block block = dots.block();
  block.stride = 3;
  expect_refusal("contrastive: rows that overlap are refused",
                 [&] { exponential_sums(block, 1, 0, Sums{rows.data(), columns.data()}, 1); });
  if (bclip::cpu::has_amx()) return;
  expect_refusal("contrastive: AMX is refused where it is missing",
                 [&] { amx_exponential_sums({}, 1, 0, Sums{rows.data(), columns.data()}, 1); });
}

}  // namespace

void check_contrastive() {
  for (const Case& of : kCases) {
    check_sums(of);
    for (const bool grouped : {false, true}) {
      check_softmax_gradient(of, grouped);
      check_sigmoid(of, grouped);
    }
  }
  check_nan();
  check_refusals();
}

}  // namespace checks
