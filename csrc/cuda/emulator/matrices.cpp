// Functions of a whole warp that load matrices or multiply fragments.
#include "csrc/cuda/device.cuh"
#include "csrc/cuda/emulator/fragments.h"

namespace bclip::cuda::emulator {
namespace {

using Columns = float __attribute__((vector_size(32)));
using Words = int32_t __attribute__((vector_size(32)));

// sums += a b over 8 elements, for 8 columns, with the arithmetic of tensor cores. All terms are
// truncated one bit below the last bit of the largest term, and the sum is rounded towards zero.
// Fasi, Higham, Mikaitis and Pranesh 2021 ("Numerical behavior of NVIDIA tensor cores") found this
// on an A100. Later GPUs keep more bits. Products of two halves are exact in a float.
[[gnu::target_clones("avx2", "default")]] void add_products(Columns& sums, const float* a,
                                                            const Columns* b) {
  Columns largest{}, total{};
  Columns terms[9] = {sums};
  for (int k = 0; k < 8; ++k) terms[k + 1] = a[k] * b[k];
  for (const Columns& term : terms) {
    const Columns size = term < 0 ? -term : term;
    largest = size > largest ? size : largest;
    total += term;
  }
  // The unit is 2^-24 times the power of two of the largest term, from the bits of a float. It is
  // at least 2^-124.
  Words exponent = (Words)largest >> 23;
  exponent = exponent < 27 ? Words{} + 27 : exponent;
  const Words unit = (exponent - 24) << 23, per_unit = (254 + 24 - exponent) << 23;
  Words units{};
  for (const Columns& term : terms) {
    units += __builtin_convertvector(term * (Columns)per_unit, Words);
  }
  Columns cut = __builtin_convertvector(units, Columns);
  const Words rounded = __builtin_convertvector(cut, Words);
  const Words away = (rounded < 0 ? -rounded : rounded) > (units < 0 ? -units : units);
  // Subtracts one unit in the last place where the conversion rounded away from zero.
  cut = (Columns)((Words)cut + away) * (Columns)unit;
  sums = total - total == 0 ? cut : total;
}

// Overloads, because a template can't have target_clones.
[[gnu::target_clones("avx2", "default")]] void convert(float* to, const Half* from, int count) {
  for (int i = 0; i < count; ++i) to[i] = number(from[i]);
}
[[gnu::target_clones("avx2", "default")]] void convert(float* to, const Bfloat16* from, int count) {
  for (int i = 0; i < count; ++i) to[i] = number(from[i]);
}

}  // namespace

void load_matrices_as_warp(void* const (&all)[32]) {
  uint16_t matrices[4][8][8];
  const auto lane_of = [&](int index) { return static_cast<MatrixLane*>(all[index]); };
  for (int index = 0; index < 32; ++index) {
    read_as_warp(lane_of(index)->site, lane_of(index)->row, matrices[index / 8][index % 8], 16);
  }
  for (int index = 0; index < 32; ++index) {
    const Place low = place_in_matrix(index, 0, lane_of(index)->transposed);
    const Place high = place_in_matrix(index, 1, lane_of(index)->transposed);
    for (int matrix = 0; matrix < 4; ++matrix) {
      lane_of(index)->to[matrix] = matrices[matrix][low.row][low.column] |
                                   uint32_t(matrices[matrix][high.row][high.column]) << 16;
    }
  }
}

template <class T>
void multiply_as_warp(void* const (&all)[32]) {
  T left_words[16][16], right_words[16][8];
  float left[16][16];
  Columns right[16], sums[16];
  const auto word = [](const uint32_t* words, int i) {
    return T{uint16_t(words[i / 2] >> i % 2 * 16)};
  };
  for (int index = 0; index < 32; ++index) {
    const MultiplyLane& lane = *static_cast<MultiplyLane*>(all[index]);
    for (int i = 0; i < 8; ++i) {
      const Place place = place_in_a(index, i);
      left_words[place.row][place.column] = word(lane.a, i);
    }
    for (int i = 0; i < 4; ++i) {
      const Place place = place_in_b(index, i), to = place_in_c(index, i);
      right_words[place.row][place.column] = word(lane.b, i);
      sums[to.row][to.column] = lane.sum[i];
    }
  }
  convert(&left[0][0], &left_words[0][0], 256);
  convert(reinterpret_cast<float*>(right), &right_words[0][0], 128);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; k += 8) add_products(sums[row], &left[row][k], &right[k]);
  }
  for (int index = 0; index < 32; ++index) {
    for (int i = 0; i < 4; ++i) {
      const Place place = place_in_c(index, i);
      static_cast<MultiplyLane*>(all[index])->sum[i] = sums[place.row][place.column];
    }
  }
}
template void multiply_as_warp<Half>(void* const (&all)[32]);
template void multiply_as_warp<Bfloat16>(void* const (&all)[32]);

}  // namespace bclip::cuda::emulator
