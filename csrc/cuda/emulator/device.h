// The device functions of device.cuh on the emulator. Only device.cuh includes this file.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "csrc/cuda/emulator/fragments.h"
#include "csrc/cuda/emulator/counters.h"
#include "csrc/cuda/emulator/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// A default argument that holds the file and line of the call.
#define BCLIP_SITE emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace bclip::cuda {

inline int thread_index() { return emulator::thread(); }
inline int lane_index() { return emulator::thread() & 31; }
inline int warp_index() { return emulator::thread() >> 5; }
inline int64_t block_index() { return emulator::block(); }

inline void block_barrier(BCLIP_SITE) {
  emulator::count(site, emulator::Kind::kBlockBarrier);
  emulator::meet_block(site);
}
inline void warp_barrier(BCLIP_SITE) {
  emulator::count(site, emulator::Kind::kWarpBarrier);
  emulator::meet_warp(site, "warp_barrier", nullptr,
                      [](void* const(&)[32]) { emulator::order_warp(); });
}

template <class T>
T shuffle(T value, int source, BCLIP_SITE) {
  struct Lane {
    T value, result;
    int source;
  } lane{value, {}, source};
  emulator::count(site, emulator::Kind::kShuffle);
  emulator::meet_warp(site, "shuffle", &lane, [](void* const(&all)[32]) {
    for (void* one : all) {
      Lane& lane = *static_cast<Lane*>(one);
      lane.result = static_cast<Lane*>(all[lane.source & 31])->value;
    }
  });
  return lane.result;
}
template <class T>
T shuffle_xor(T value, int mask, BCLIP_SITE) {
  return shuffle(value, lane_index() ^ mask, site);
}

template <class T>
struct Shared {
  int byte;

  int64_t place(int index) const { return byte + int64_t(index) * int64_t(sizeof(T)); }
  T load(int index, BCLIP_SITE) const { return load_as<T>(index, site); }
  void store(int index, T value, BCLIP_SITE) const { store_as(index, value, site); }
  template <class Wide>
  Wide load_as(int index, BCLIP_SITE) const {
    Wide value;
    emulator::count(site, emulator::Kind::kSharedLoad, place(index), nullptr, sizeof value);
    emulator::read(site, place(index), &value, sizeof value);
    return value;
  }
  template <class Wide>
  void store_as(int index, Wide value, BCLIP_SITE) const {
    emulator::count(site, emulator::Kind::kSharedStore, place(index), nullptr, sizeof value);
    emulator::write(site, place(index), &value, sizeof value);
  }
};

namespace emulator {

struct MatrixLane {
  uint32_t* to;
  int64_t row;  // the first byte of the row
  bool transposed;
  Site site;
};

inline void load_matrices(uint32_t (&to)[4], int64_t row, bool transposed, Site site) {
  MatrixLane lane{to, row, transposed, site};
  count(site, Kind::kLoadMatrices, row, nullptr, 16);
  meet_warp(site, "load_matrices", &lane, [](void* const(&all)[32]) {
    uint16_t matrices[4][8][8];
    const auto lane_of = [&](int index) { return static_cast<MatrixLane*>(all[index]); };
    for (int index = 0; index < 32; ++index) {
      read_as_warp(lane_of(index)->site, lane_of(index)->row, matrices[index / 8][index % 8], 16);
    }
    for (int index = 0; index < 32; ++index) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const Place low = place_in_matrix(index, 0, lane_of(index)->transposed);
        const Place high = place_in_matrix(index, 1, lane_of(index)->transposed);
        lane_of(index)->to[matrix] = matrices[matrix][low.row][low.column] |
                                     uint32_t(matrices[matrix][high.row][high.column]) << 16;
      }
    }
  });
}

}  // namespace emulator

template <class T>
void load_matrices(uint32_t (&to)[4], Shared<T> from, int index, BCLIP_SITE) {
  emulator::load_matrices(to, from.place(index), false, site);
}
template <class T>
void load_matrices_transposed(uint32_t (&to)[4], Shared<T> from, int index, BCLIP_SITE) {
  emulator::load_matrices(to, from.place(index), true, site);
}

inline float number(Half value) {
  _Float16 half;
  std::memcpy(&half, &value, 2);
  return half;
}
inline float number(Bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float single;
  std::memcpy(&single, &bits, 4);
  return single;
}
inline void round_to(Half& to, float value) {
  const _Float16 half = value;
  std::memcpy(&to, &half, 2);
}
inline void round_to(Bfloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to.bits = std::isnan(value) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
uint32_t pack(float low, float high) {
  T pair[2];
  round_to(pair[0], low);
  round_to(pair[1], high);
  return pair[0].bits | uint32_t(pair[1].bits) << 16;
}

struct alignas(8) Pair {
  float low, high;
};
template <class T>
Pair unpack(uint32_t pair) {
  return {number(T{uint16_t(pair)}), number(T{uint16_t(pair >> 16)})};
}

namespace emulator {

using Columns = float __attribute__((vector_size(32)));
using Words = int32_t __attribute__((vector_size(32)));

// sums += a b over 8 elements, for 8 columns, with the arithmetic of tensor cores. All terms are
// truncated one bit below the last bit of the largest term, and the sum is rounded towards zero.
// Fasi, Higham, Mikaitis and Pranesh 2021 ("Numerical behavior of NVIDIA tensor cores") found this
// on an A100. Later GPUs keep more bits. Products of two halves are exact in a float. This function
// uses no memory of a kernel, and the sanitizers skip it, because they would make tests several
// times slower.
[[gnu::optimize("O2"), gnu::no_sanitize("address", "undefined"),
  gnu::target_clones("avx2", "default")]] static void
add_products(Columns& sums, const float* a, const Columns* b) {
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

// A pseudo-random number from -most to most, determined by the bits of x.
inline int error_of(float x, int most) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<int>((bits * 0x9e3779b9u >> 16) % (2 * most + 1)) - most;
}
// y with an error of up to `most` units in the last place.
inline float last_places(float y, float x, int most = 2) {
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  bits += error_of(x, most);
  std::memcpy(&y, &bits, 4);
  return y;
}

}  // namespace emulator

template <class T>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BCLIP_SITE) {
  struct Lane {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
  } lane{sum, a, {b0, b1}};
  emulator::count(site, emulator::Kind::kMultiply);
  emulator::meet_warp(site, "multiply", &lane, [](void* const(&all)[32]) {
    float left[16][16];
    emulator::Columns right[16], sums[16];
    for (int index = 0; index < 32; ++index) {
      const Lane& lane = *static_cast<Lane*>(all[index]);
      const auto half = [](const uint32_t* words, int i) {
        return number(T{uint16_t(words[i / 2] >> i % 2 * 16)});
      };
      for (int i = 0; i < 8; ++i) {
        const emulator::Place place = emulator::place_in_a(index, i);
        left[place.row][place.column] = half(lane.a, i);
      }
      for (int i = 0; i < 4; ++i) {
        const emulator::Place place = emulator::place_in_b(index, i),
                              to = emulator::place_in_c(index, i);
        right[place.row][place.column] = half(lane.b, i);
        sums[to.row][to.column] = lane.sum[i];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; k += 8) emulator::add_products(sums[row], &left[row][k], &right[k]);
    }
    for (int index = 0; index < 32; ++index) {
      for (int i = 0; i < 4; ++i) {
        const emulator::Place place = emulator::place_in_c(index, i);
        static_cast<Lane*>(all[index])->sum[i] = sums[place.row][place.column];
      }
    }
  });
}

template <class T>
T load_global(const T* from, BCLIP_SITE) {
  emulator::count(site, emulator::Kind::kGlobalLoad, -1, from, sizeof(T));
  return *from;
}
template <class T>
void store_global(T* to, T value, BCLIP_SITE) {
  emulator::count(site, emulator::Kind::kGlobalStore, -1, to, sizeof(T));
  *to = value;
}
inline void rejoin_lanes() {
  if (emulator::counting) emulator::rejoin_lane();
}

template <class T>
void copy_async(Shared<T> to, int index, const T* from, bool valid, BCLIP_SITE) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || to.place(index) % 16) {
    throw std::runtime_error("copy_async: an address isn't a multiple of 16");
  }
  emulator::count(site, emulator::Kind::kCopy, to.place(index), valid ? from : nullptr, 16);
  emulator::copy_later(site, to.place(index), valid ? from : nullptr, 16);
}
inline void commit_copies() { emulator::close_copies(); }
template <int N>
void wait_for_copies() {
  emulator::finish_copies(N);
}

// Like ex2.approx.ftz, lg2.approx and rcp.approx.ftz, with the largest errors that the CUDA C++
// programming guide and the PTX ISA allow ("Mathematical functions", intrinsics; "rcp"). These are
// 2 units in the last place, or 2^-22 for logarithms of 0.5 to 2, or 1 unit for reciprocals.
// Subnormal arguments of reciprocals, and subnormal results, are zero.
inline float exp2_fast(float x, BCLIP_SITE) {
  emulator::count(site, emulator::Kind::kExp2);
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f
         : x == 0.0f || !std::isfinite(y)      ? y
                                               : emulator::last_places(y, x);
}
inline float log2_fast(float x, BCLIP_SITE) {
  emulator::count(site, emulator::Kind::kLog2);
  const float y = std::log2(x);
  if (!std::isfinite(y)) return y;
  return x >= 0.5f && x <= 2.0f ? y + emulator::error_of(x, 1) * 0x1p-22f
                                : emulator::last_places(y, x);
}
inline float reciprocal_fast(float x, BCLIP_SITE) {
  emulator::count(site, emulator::Kind::kReciprocal);
  constexpr float kLeast = std::numeric_limits<float>::min();
  const float y = 1.0f / (std::fabs(x) < kLeast ? std::copysign(0.0f, x) : x);
  if (std::fabs(y) < kLeast) return std::copysign(0.0f, y);
  return std::isfinite(y) ? emulator::last_places(y, x, 1) : y;
}
inline double product(double a, double b) { return a * b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float infinity() { return std::numeric_limits<float>::infinity(); }

template <class Arguments>
void launch(void (*kernel)(Arguments), const Launch& where, Arguments arguments) {
  emulator::run(reinterpret_cast<const void*>(kernel), where.blocks, where.threads,
                where.shared_bytes, [&] { kernel(arguments); });
}

}  // namespace bclip::cuda
