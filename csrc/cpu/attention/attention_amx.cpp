// The attention kernels for bfloat16 on the matrix unit of x86 (AMX). P and dS are rounded to
// bfloat16 when they become operands.
#define BCLIP_ISA amx
#include "csrc/cpu/attention/attention_kernels.h"
#include "csrc/cpu/simd/target.h"

#ifdef BCLIP_ISA_AVAILABLE

#include "csrc/cpu/attention/attention-inl.h"
#include "csrc/cpu/simd/amx.h"

namespace bclip::cpu::amx {

namespace {

typedef uint16_t AmxHalves __attribute__((vector_size(64)));

// A left block is [2][16 rows][32 k], a right block [2][16 pairs of k][16 columns][2 k].
struct AmxEngine {
  using Element = uint16_t;

  using Session = AmxSession;

  static constexpr bool kTrims = false;

  static void load_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns,
                        uint16_t* block) {
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

  // transpose() treats two neighbours as one 32-bit element.
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
    _mm512_store_si512(block + row * kPanel,
                       (__m512i)_mm512_cvtne2ps_pbh((__m512)numbers[1], (__m512)numbers[0]));
  }

  BCLIP_INLINE void right_rows(uint16_t* block, int64_t row, const Lanes numbers[2][2]) {
    for (int half = 0; half < 2; ++half) {
      const auto rounded =
          (__m512i)_mm512_cvtne2ps_pbh((__m512)numbers[1][half], (__m512)numbers[0][half]);
      // `rounded` holds both rows: the second one in its upper half.
      _mm512_store_si512(block + half * kBlock / 2 + row * kLanes,
                         _mm512_permutexvar_epi16(interleaved(), rounded));
    }
  }

  static void multiply(const uint16_t* left, const uint16_t* right, const Extent& extent,
                       float* result, int64_t stride, bool add) {
    BCLIP_ISA::multiply(left, right, panels_of(extent.depth), result, add, [](int64_t) {}, stride);
  }

 private:
  // Indices that interleave sixteen of the first 32 elements, from `start` on, with the same
  // sixteen of the second 32.
  BCLIP_INLINE __m512i pairs(int start) {
    AmxHalves index;
    for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(start + i / 2 + (i & 1) * 32);
    return (__m512i)index;
  }

  // Indices that interleave sixteen elements with the sixteen that follow.
  BCLIP_INLINE __m512i interleaved() {
    AmxHalves index;
    for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i / 2 + (i & 1) * 16);
    return (__m512i)index;
  }
};

}  // namespace

const AttentionKernels kBfloat16Attention = HeadKernels<AmxEngine, uint16_t>::kernels();

}  // namespace bclip::cpu::amx

#endif
