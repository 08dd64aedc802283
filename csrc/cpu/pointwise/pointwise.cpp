#include "csrc/pointwise.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "csrc/cpu/parallel.h"
#include "csrc/cpu/pointwise/pointwise_kernels.h"

namespace bclip::cpu {

namespace {

// Rows of a task. A sum over rows is computed within each task first, and then over the tasks.
constexpr int64_t kRows = 32;
constexpr int64_t kValues = 16384;  // values of a task of gelu

const PointwiseKernels& kernels() { return pointwise_kernels(isa_in_use()); }

int64_t num_tasks(int64_t count, int64_t each) {
  if (count < 0) throw std::invalid_argument("pointwise: a size is negative");
  return (count + each - 1) / each;
}

int64_t row_width(int64_t columns) { return (columns + 31) / 32 * 32; }

std::vector<float> scratch(int64_t columns) {
  return std::vector<float>(kScratchRows * row_width(columns));
}

}  // namespace

void add_norm(const AddNorm& norm, int threads) {
  const int64_t tasks = num_tasks(norm.columns ? norm.rows : norm.columns, kRows);
  parallel(tasks, threads, [&](int64_t task) {
    auto keep = scratch(norm.columns);
    kernels().add_norm(norm, task * kRows, std::min(norm.rows, (task + 1) * kRows), keep.data());
  });
}

void add_norm_backward(const AddNormGradient& gradient, int threads) {
  const int64_t columns = gradient.columns,
                tasks = num_tasks(columns ? gradient.rows : columns, kRows);
  const int64_t width = row_width(columns);
  std::vector<float> sums(tasks * 2 * width);
  parallel(tasks, threads, [&](int64_t task) {
    auto keep = scratch(columns);
    kernels().add_norm_backward(gradient, task * kRows, std::min(gradient.rows, (task + 1) * kRows),
                                keep.data(), sums.data() + task * 2 * width);
  });
  std::vector<double> totals(2 * width);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t j = 0; j < 2 * width; ++j) totals[j] += sums[task * 2 * width + j];
  for (int64_t j = 0; j < columns; ++j) {
    gradient.weight_grad[j] = static_cast<float>(totals[j]);
    gradient.bias_grad[j] = static_cast<float>(totals[width + j]);
  }
}

void gelu(Values x, Values out, int64_t count, int threads) {
  parallel(num_tasks(count, kValues), threads, [&](int64_t task) {
    kernels().gelu(x, out, task * kValues, std::min(count, (task + 1) * kValues));
  });
}

void gelu_backward(Values grad, Values x, Values out, int64_t count, int threads) {
  parallel(num_tasks(count, kValues), threads, [&](int64_t task) {
    kernels().gelu_backward(grad, x, out, task * kValues, std::min(count, (task + 1) * kValues));
  });
}

}  // namespace bclip::cpu
