// The device functions of device.cuh on the emulator. Only device.cuh includes this file.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

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
template <int kBarrier, int kThreads>
void named_barrier(BCLIP_SITE) {
  static_assert(kBarrier > 0 && kBarrier < 16 && kThreads % 32 == 0);
  if (emulator::threads() != kThreads)
    throw std::runtime_error("named_barrier: the emulator needs all threads of the block");
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

void load_matrices_as_warp(void* const (&all)[32]);

inline void load_matrices(uint32_t (&to)[4], int64_t row, bool transposed, Site site) {
  MatrixLane lane{to, row, transposed, site};
  count(site, Kind::kLoadMatrices, row, nullptr, 16);
  meet_warp(site, "load_matrices", &lane, load_matrices_as_warp);
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
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float scaled;
  std::memcpy(&scaled, &bits, 4);
  // The exponents of float16 and float32 are 112 apart. The product is exact, also for subnormal
  // numbers.
  scaled *= 0x1p112f;
  std::memcpy(&bits, &scaled, 4);
  bits |= magnitude >= 0x7c00 ? 0x7f800000u : 0u;
  bits |= uint32_t(value.bits & 0x8000u) << 16;
  std::memcpy(&scaled, &bits, 4);
  return scaled;
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

struct MultiplyLane {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};
template <class T>
void multiply_as_warp(void* const (&all)[32]);

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
  emulator::MultiplyLane lane{sum, a, {b0, b1}};
  emulator::count(site, emulator::Kind::kMultiply);
  emulator::meet_warp(site, "multiply", &lane, emulator::multiply_as_warp<T>);
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
