// The arithmetic of the contrastive kernels: of one element, one row or one tile, whatever its size
// and whichever threads hold it. The kernels of 128 x 128 tiles and those of Hopper share it.
#pragma once

#include "csrc/cuda/contrastive/contrastive.h"
#include "csrc/cuda/device.cuh"

namespace bclip::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct TilePlace {
  int row, column;    // its first row and column
  int rows, columns;  // its size, which is smaller at the ends
};

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Greater {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Less {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
};

// The positive of row i of the tile is in column i + shift. If a tile of this many rows and columns
// holds no positive, the shift is kNoPositives, which leads to no column.
constexpr int kNoPositives = 1 << 20;
__device__ __forceinline__ int positives_of(const Features& features, const TilePlace& tile,
                                            int rows, int columns) {
  const int64_t shift = features.first + tile.row - tile.column;
  return shift > -rows && shift < columns ? static_cast<int>(shift) : kNoPositives;
}

// Whether the tile is complete and holds no positive. Nearly all tiles of a large batch are such.
// They take a shorter path without conditions for each element.
__device__ __forceinline__ bool is_plain(const TilePlace& tile, int shift, int rows, int columns) {
  return tile.rows == rows && tile.columns == columns && shift == kNoPositives;
}

__device__ __forceinline__ bool is_inside(const TilePlace& tile, int row, int column) {
  return row < tile.rows && column < tile.columns;
}

// ---- Log-sum-exps. Logits are in units of ln 2.

// An offset below every logit. Sums of no term stay zero with it.
constexpr float kNoLogit = -1e30f;

// The logit of a negative inside the tile. The others are minus infinity.
__device__ __forceinline__ float negative_logit(const TilePlace& tile, int shift, int row,
                                                int column, float number, float factor) {
  const bool counted = is_inside(tile, row, column) && column != row + shift;
  return counted ? number * factor : -infinity();
}
__device__ __forceinline__ float exponential(float number, float factor, float offset) {
  return exp2_fast(fmaf(number, factor, -offset));
}
// Whether a sum loses digits, so that its terms need an offset of their own. Terms that flush to
// zero are below 1e-37 of the highest, far below the last digit of a sum that passes.
__device__ __forceinline__ bool loses_digits(float sum) { return sum < 1e-20f; }
// log(2^offset * sum), in units of 1.
__device__ __forceinline__ float log_of_sum(float offset, float sum) {
  return (offset + log2_fast(sum)) * kLn2;
}

// ---- The softmax's gradient.

// exp(S - R) + exp(S - Q) = exp(S - m) (exp(m - R) + exp(m - Q)) takes one exponential. It fails if
// the R and Q of the tile are so far apart that no m serves both. A row without a loss has an
// infinite R and the factor zero.
struct Middle {
  float value;
  bool near;  // whether it serves the tile

  // From the lowest and the highest finite R or Q of the tile.
  __device__ __forceinline__ Middle(float lowest, float highest) : near(highest - lowest < 86.0f) {
    value = lowest == infinity() ? 0.0f : near ? (lowest + highest) * 0.5f : 0.0f;
  }
  // The factor of a row or a column. `rest` is that of Normalizers, times the unit of G.
  __device__ __forceinline__ float factor(float its_near, float rest) const {
    return near ? exp2_fast(value - its_near) * rest : rest;
  }
};
__device__ __forceinline__ float finite_or_lowest(float near) {
  return near == infinity() ? -infinity() : near;
}
// unit * G / w of a negative if the tile has a middle and each of its rows and columns has a loss.
// S is at most R and Q, so nothing overflows.
__device__ __forceinline__ float softmax_gradient(float product, float factor, float middle,
                                                  float row_factor, float column_factor) {
  return exp2_fast(product * factor - middle) * (row_factor + column_factor);
}
// The same of any tile with a middle. The bound avoids 0 * inf if neither the row nor the column
// has a loss.
__device__ __forceinline__ float bounded_gradient(float logit, float middle, float row_factor,
                                                  float column_factor) {
  return exp2_fast(fminf(logit - middle, 126.0f)) * (row_factor + column_factor);
}
// The same of a tile without a middle.
__device__ __forceinline__ float split_gradient(float logit, float row_near, float row_rest,
                                                float column_near, float column_rest) {
  return exp2_fast(logit - row_near) * row_rest + exp2_fast(logit - column_near) * column_rest;
}

// ---- The sigmoid loss and its gradient.

__device__ __forceinline__ float total(const float (&parts)[4]) {
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// log(1 + x) for x >= 0, to a relative 3e-7. Below 1 it is x times the Chebyshev interpolant of
// log(1 + x) / x.
__device__ __forceinline__ float log1p_fast(float x) {
  float series = x * 0.00512610212f - 0.0290740646f;
  series = series * x + 0.0775160866f;
  series = series * x - 0.136022476f;
  series = series * x + 0.190768807f;
  series = series * x - 0.24835399f;
  series = series * x + 0.333181217f;
  series = series * x - 0.49999445f;
  series = series * x + 0.999999966f;
  return x < 1.0f ? x * series : log2_fast(1.0f + x) * kLn2;
}

// The sums of a thread. Each has 4 parts, so that neighbouring elements don't wait for each other.
struct SigmoidSums {
  float gradients[4] = {}, products[4] = {}, linear[4] = {}, growth[4] = {};

  // Adds the loss of an element, and returns its unit * sigmoid. `logit` is in units of ln 2. The
  // sum of log(1 + small) is the logarithm of a product, so it takes a logarithm for each part, not
  // for each element. `growth` is the product less 1, and so keeps the digits of small terms. A
  // part multiplies 32 numbers of at most 2.
  __device__ __forceinline__ float add(int part, float logit, float per_unit) {
    const float small = exp2_fast(-fabsf(logit));
    growth[part] = growth[part] * small + (growth[part] + small);
    linear[part] += fmaxf(logit, 0.0f);
    return (logit >= 0.0f ? 1.0f : small) * reciprocal_fast(small * per_unit + per_unit);
  }
  __device__ __forceinline__ void add_gradient(int part, float gradient, float product) {
    gradients[part] += gradient;
    products[part] += gradient * product;
  }
  __device__ __forceinline__ float loss() const {
    float logarithms = 0.0f;
#pragma unroll
    for (float one : growth) logarithms += log1p_fast(one);
    return total(linear) * kLn2 + logarithms;
  }
};

}  // namespace bclip::cuda
