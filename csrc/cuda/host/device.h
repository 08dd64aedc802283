// The vocabulary's meaning on the host (see machine.h). Included by device.cuh alone.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "fragments.h"
#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// Where a word stands in a kernel's source.
#define BCLIP_SITE host::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace bclip::cuda {

inline int thread_index() { return host::thread(); }
inline int lane_index() { return host::thread() & 31; }
inline int warp_index() { return host::thread() >> 5; }
inline int64_t block_index() { return host::block(); }

inline void block_barrier(BCLIP_SITE) { host::meet_block(site); }
inline void warp_barrier(BCLIP_SITE) {
  host::meet_warp(site, "warp_barrier", nullptr, [](void* const(&)[32]) { host::order_warp(); });
}

template <class T>
T shuffle(T value, int source, BCLIP_SITE) {
  struct Lane {
    T value, result;
    int source;
  } lane{value, {}, source};
  host::meet_warp(site, "shuffle", &lane, [](void* const(&all)[32]) {
    for (void* one : all) {
      Lane& own = *static_cast<Lane*>(one);
      own.result = static_cast<Lane*>(all[own.source & 31])->value;
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
    host::read(site, place(index), &value, sizeof value);
    return value;
  }
  template <class Wide>
  void store_as(int index, Wide value, BCLIP_SITE) const {
    host::write(site, place(index), &value, sizeof value);
  }
};

namespace host {

struct MatrixLane {
  uint32_t* to;
  int64_t row;  // its first byte
  bool transposed;
  Site site;
};

inline void load_matrices(uint32_t (&to)[4], int64_t row, bool transposed, Site site) {
  MatrixLane lane{to, row, transposed, site};
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
        lane_of(index)->to[matrix] =
            matrices[matrix][low.row][low.column] | uint32_t(matrices[matrix][high.row][high.column]) << 16;
      }
    }
  });
}

}  // namespace host

template <class T>
void load_matrices(uint32_t (&to)[4], Shared<T> from, int index, BCLIP_SITE) {
  host::load_matrices(to, from.place(index), false, site);
}
template <class T>
void load_matrices_transposed(uint32_t (&to)[4], Shared<T> from, int index, BCLIP_SITE) {
  host::load_matrices(to, from.place(index), true, site);
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

template <class T>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BCLIP_SITE) {
  struct Lane {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
  } lane{sum, a, {b0, b1}};
  host::meet_warp(site, "multiply", &lane, [](void* const(&all)[32]) {
    float left[16][16], right[16][8];
    for (int index = 0; index < 32; ++index) {
      const Lane& own = *static_cast<Lane*>(all[index]);
      const auto half = [](const uint32_t* words, int i) { return number(T{uint16_t(words[i / 2] >> i % 2 * 16)}); };
      for (int i = 0; i < 8; ++i) {
        const host::Place place = host::place_in_a(index, i);
        left[place.row][place.column] = half(own.a, i);
      }
      for (int i = 0; i < 4; ++i) {
        const host::Place place = host::place_in_b(index, i);
        right[place.row][place.column] = half(own.b, i);
      }
    }
    float product[16][8] = {};
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) product[row][column] += left[row][k] * right[k][column];
      }
    }
    for (int index = 0; index < 32; ++index) {
      for (int i = 0; i < 4; ++i) {
        const host::Place place = host::place_in_c(index, i);
        static_cast<Lane*>(all[index])->sum[i] += product[place.row][place.column];
      }
    }
  });
}

template <class T>
void copy_async(Shared<T> to, int index, const T* from, bool wanted, BCLIP_SITE) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || to.place(index) % 16) {
    throw std::runtime_error("copy_async: an address isn't a multiple of 16");
  }
  host::copy_later(site, to.place(index), wanted ? from : nullptr, 16);
}
inline void commit_copies() { host::close_copies(); }
template <int N>
void wait_for_copies() {
  host::finish_copies(N);
}

// ex2.approx.ftz: subnormal results are zero.
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
inline float log2_fast(float x) { return std::log2(x); }
inline uint32_t high_product(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float infinity() { return std::numeric_limits<float>::infinity(); }

template <class Arguments>
void launch(void (*kernel)(Arguments), const Launch& where, Arguments arguments) {
  host::run(where.blocks, where.threads, where.shared_bytes, [&] { kernel(arguments); });
}

}  // namespace bclip::cuda
