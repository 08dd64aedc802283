// bfloat16 operands on the matrix unit of x86; P and dS are rounded to bfloat16 as they become operands.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "csrc/cpu/attention/attention_kernels.h"

#if defined(BCLIP_X86_TARGETS) && defined(__linux__)

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics start from an undefined vector
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")

#define BCLIP_AVX512 1
#include "csrc/cpu/simd/amx.h"
#include "csrc/cpu/attention/attention-inl.h"

namespace {

typedef uint16_t AmxHalves __attribute__((vector_size(64)));

// A left block is [2][16 rows][32 k], a right one [2][16 pairs of k][16 columns][2 k].
struct AmxEngine {
  using Element = uint16_t;

  using Use = bclip::cpu::Unit;

  static constexpr bool kTrims = false;

  static void load_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* block) {
    const __mmask32 inside = columns >= kPanel ? 0xFFFFFFFF : 0xFFFF;
    for (int64_t row = 0; row < kPanel; ++row)
      _mm512_store_si512(block + row * kPanel,
                         _mm512_maskz_loadu_epi16(row < rows ? inside : 0, from + row * stride));
  }

  static void right(const uint16_t* block, uint16_t* to) {
    for (int64_t row = 0; row < kPanel; row += 2) {
      const __m512i first = _mm512_load_si512(block + row * kPanel);
      const __m512i second = _mm512_load_si512(block + (row + 1) * kPanel);
      for (int half = 0; half < 2; ++half)
        _mm512_store_si512(to + half * kBlock / 2 + row * kLanes,
                           _mm512_permutex2var_epi16(first, pairs(half ? kLanes : 0), second));
    }
  }

  // A pair of neighbours is a 32-bit number to `transpose`.
  static void right_of_transpose(const uint16_t* block, uint16_t* to) {
    for (int half = 0; half < 2; ++half)
      transpose(block + half * kBlock / 2, kLanes, to + half * kBlock / 2, kLanes);
  }

  static void left_of_transpose(const uint16_t* block, uint16_t* to) {
    alignas(64) uint16_t paired[kBlock];
    right(block, paired);
    right_of_transpose(paired, to);
  }

  BCLIP_INLINE void left_row(uint16_t* block, int64_t row, const Lanes numbers[2]) {
    _mm512_store_si512(block + row * kPanel, (__m512i)_mm512_cvtne2ps_pbh((__m512)numbers[1], (__m512)numbers[0]));
  }

  BCLIP_INLINE void right_rows(uint16_t* block, int64_t row, const Lanes numbers[2][2]) {
    for (int half = 0; half < 2; ++half) {
      const auto rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)numbers[1][half], (__m512)numbers[0][half]);
      // The second vector of the permutation is the upper half of the first.
      _mm512_store_si512(block + half * kBlock / 2 + row * kLanes,
                         _mm512_permutexvar_epi16(interleaved(), rounded));
    }
  }

  static void multiply(const uint16_t* left, const uint16_t* right, const Extent& extent, float* result, int64_t stride,
                       bool add) {
    bclip::cpu::multiply(left, right, panels_of(extent.depth), result, add, [](int64_t) {}, stride);
  }

 private:
  // Indices that interleave sixteen of the first 32 numbers, from `start` on, with the same of the second 32.
  BCLIP_INLINE __m512i pairs(int start) {
    AmxHalves index;
    for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(start + i / 2 + (i & 1) * 32);
    return (__m512i)index;
  }

  // Indices that interleave sixteen numbers with the sixteen that follow.
  BCLIP_INLINE __m512i interleaved() {
    AmxHalves index;
    for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i / 2 + (i & 1) * 16);
    return (__m512i)index;
  }
};

}  // namespace

namespace bclip::cpu {

const AttentionKernels kAmxAttention = HeadKernels<AmxEngine, uint16_t>::kernels("amx");

}  // namespace bclip::cpu

#endif
