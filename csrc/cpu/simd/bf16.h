// bfloat16 in memory: the upper halves of floats.
//
// Rounding is to nearest, ties to even. A NaN becomes quiet and keeps its sign and the upper bits
// of its payload, as in the instructions of x86 (VCVTNEPS2BF16) and Arm (BFCVT). So all CPU kernels
// have the same rule.
#pragma once

#include "csrc/cpu/simd/vec.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

// Loads bfloat16 as floats.
template <class V>
BCLIP_INLINE V PromoteTo(const uint16_t* from) {
  if constexpr (kIsPair<V>) {
    using Half = decltype(V::low);
    return {PromoteTo<Half>(from), PromoteTo<Half>(from + sizeof(Half) / 4)};
  } else {
#if defined(BCLIP_AVX512)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(BCLIP_AVX2)
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#elif defined(BCLIP_X86)
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (V)_mm_unpacklo_epi16(_mm_setzero_si128(), halves);
#elif defined(BCLIP_NEON)
    return (V)vshll_n_u16(vld1_u16(from), 16);
#else
    typename VectorOf<uint32_t, sizeof(V)>::type words;
    for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i)
      words[i] = static_cast<uint32_t>(from[i]) << 16;
    return (V)words;
#endif
  }
}

BCLIP_INLINE Lanes Load(const uint16_t* from) { return PromoteTo<Lanes>(from); }

// Stores the upper halves of 32-bit words.
BCLIP_INLINE void StoreUpperHalves(uint16_t* to, IntLanes words) {
#if defined(BCLIP_AVX512)
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)words, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
#elif defined(BCLIP_AVX2)
  const IntLanes shifted = words >> 16;  // an arithmetic shift, so that packing saturates nothing
  const __m256i halves = _mm256_packs_epi32((__m256i)shifted.low, (__m256i)shifted.high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(halves, 0xD8));
#elif defined(BCLIP_X86)
  const IntLanes shifted = words >> 16;
  auto* const halves = reinterpret_cast<__m128i*>(to);
  _mm_storeu_si128(halves, _mm_packs_epi32((__m128i)shifted.low.low, (__m128i)shifted.low.high));
  _mm_storeu_si128(halves + 1,
                   _mm_packs_epi32((__m128i)shifted.high.low, (__m128i)shifted.high.high));
#else
  uint32_t each[kLanes];
  StoreAs(each, words);
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint16_t>(each[i] >> 16);
#endif
}

// Rounds to bfloat16.
BCLIP_INLINE IntLanes DemoteToUpperHalves(Lanes lanes) {
  const Words bits = BitCast<Words>(lanes);
  const Words rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
  return BitCast<IntLanes>(IfThenElse(lanes == lanes, rounded, bits | 0x400000u));
}

BCLIP_INLINE void Store(uint16_t* to, Lanes lanes) {
  StoreUpperHalves(to, DemoteToUpperHalves(lanes));
}

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
