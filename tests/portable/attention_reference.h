// Attention of one query in double precision, with bounds on the error of arithmetic in float.
#pragma once

#include "checks.h"

namespace checks {

// One query of one head, with the keys and values that it sees.
struct Query {
  const double* query;                      // (dim,)
  std::vector<const double*> keys, values;  // (dim,) each
  std::vector<double> factors;              // dropout: 0 or 1 / (1 - p)
  int64_t dim;
  double scale;
};

struct Forward {
  // (dim,); the bound excludes the rounding to the output dtype.
  std::vector<double> out, out_bound;
  double lse, lse_bound;
};

// The scores. Writes the largest sum of absolute terms of a score to `size`.
inline std::vector<double> scores_of(const Query& query, double& size) {
  std::vector<double> scores;
  size = 0;
  for (const double* key : query.keys) {
    double score = 0, terms = 0;
    for (int64_t i = 0; i < query.dim; ++i) {
      score += query.query[i] * key[i];
      terms += std::abs(query.query[i] * key[i]);
    }
    scores.push_back(query.scale * score);
    size = std::max(size, query.scale * terms);
  }
  return scores;
}

// A score is a sum of dim products. The factor, log2(e) and the subtraction of the maximum round
// six more times.
inline double score_error(const Query& query, double size) {
  return static_cast<double>(query.dim + 6) * kUnit * size;
}

inline Forward forward(const Query& query) {
  Forward result = {std::vector<double>(query.dim), std::vector<double>(query.dim),
                    -std::numeric_limits<double>::infinity(), 0};
  if (query.keys.empty()) return result;
  double size;
  const std::vector<double> scores = scores_of(query, size);
  const double highest = *std::max_element(scores.begin(), scores.end());
  const double count = static_cast<double>(scores.size());
  double total = 0;
  for (const double score : scores) total += std::exp(score - highest);
  // Twice: once for a weight, once for the sum that divides it.
  const double relative = 2 * (score_error(query, size) + kExp) + (2 * count + 12) * kUnit;
  for (size_t j = 0; j < scores.size(); ++j) {
    const double weight = std::exp(scores[j] - highest) / total * query.factors[j];
    for (int64_t i = 0; i < query.dim; ++i) {
      result.out[i] += weight * query.values[j][i];
      result.out_bound[i] += relative * weight * std::abs(query.values[j][i]);
    }
  }
  result.lse = highest + std::log(total);
  result.lse_bound =
      2 * score_error(query, size) + kExp +
      (3 * size + count + 4 + 4 * std::log(total) + 2 * std::abs(result.lse)) * kUnit;
  return result;
}

// Sums of gradients, and their bounds without the rounding to the output dtype.
struct Gradient {
  explicit Gradient(int64_t size) : value(size), bound(size) {}

  std::vector<double> value, bound;
};

// Adds the contribution of the query to its gradient at `to`, and to those of key and value j at
// `key_to[j]` and `value_to[j]`. `terms` bounds the number of terms of any sum.
inline void backward(const Query& query, const double* out_grad, const double* out, double lse,
                     int64_t terms, Gradient& query_grad, int64_t to, Gradient& key_grad,
                     const std::vector<int64_t>& key_to, Gradient& value_grad,
                     const std::vector<int64_t>& value_to) {
  if (query.keys.empty()) return;
  double size, delta = 0, delta_size = 0;
  const std::vector<double> scores = scores_of(query, size);
  const double weight_error = score_error(query, size) + 3 * (std::abs(lse) + size) * kUnit + kExp;
  const double sum_error = static_cast<double>(terms + 4) * kUnit;
  for (int64_t i = 0; i < query.dim; ++i) {
    delta += out_grad[i] * out[i];
    delta_size += std::abs(out_grad[i] * out[i]);
  }
  for (size_t j = 0; j < scores.size(); ++j) {
    const double weight = std::exp(scores[j] - lse), factor = query.factors[j];
    double grad = 0, grad_size = 0;
    for (int64_t i = 0; i < query.dim; ++i) {
      grad += factor * out_grad[i] * query.values[j][i];
      grad_size += std::abs(factor * out_grad[i] * query.values[j][i]);
      value_grad.value[value_to[j] + i] += weight * factor * out_grad[i];
      value_grad.bound[value_to[j] + i] +=
          weight * factor * std::abs(out_grad[i]) * (weight_error + sum_error);
    }
    const double score_grad = weight * (grad - delta) * query.scale;
    const double relative = static_cast<double>(query.dim + 6) * kUnit + weight_error + sum_error;
    const double error = weight * (grad_size + delta_size) * query.scale * relative;
    for (int64_t i = 0; i < query.dim; ++i) {
      query_grad.value[to + i] += score_grad * query.keys[j][i];
      query_grad.bound[to + i] += error * std::abs(query.keys[j][i]);
      key_grad.value[key_to[j] + i] += score_grad * query.query[i];
      key_grad.bound[key_to[j] + i] += error * std::abs(query.query[i]);
    }
  }
}

// 0 or 1 / (1 - p), as csrc/attention.h defines it.
inline double dropout_factor(double p, uint64_t seed, int64_t row, int64_t head, int64_t key) {
  if (p == 0) return 1;
  const uint32_t word = philox(seed, static_cast<uint32_t>(key), static_cast<uint32_t>(row),
                               static_cast<uint32_t>(head));
  return word < static_cast<uint32_t>(p * 0x1p32) ? 0 : 1 / (1 - p);
}

}  // namespace checks
