// Philox (csrc/philox.h) of eight counters at a time: word i of all counters is one vector of
// 64-bit lanes, of which the lower halves count.
#pragma once

#include "csrc/cpu/simd/vec.h"
#include "csrc/philox.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

// If the lanes hold the eight counters in this order, Interleaved() returns the words in ascending
// order of the counters.
constexpr uint64_t kPhiloxOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};

struct PhiloxVec {
  WideWords word0, word1, word2, word3;

  BCLIP_MEMBER_INLINE void Round(uint64_t key0, uint64_t key1) {
    const WideWords product0 = MulEven(word0, kPhiloxFactor0),
                    product2 = MulEven(word2, kPhiloxFactor2);
    word0 = (product2 >> 32) ^ word1 ^ key0;
    word2 = (product0 >> 32) ^ word3 ^ key1;
    word1 = product2;
    word3 = product0;
  }

  // The first sixteen and the last sixteen words of the eight counters, in order.
  BCLIP_MEMBER_INLINE void Interleaved(Words& low, Words& high) const {
    const WideWords first = (word0 & 0xFFFFFFFF) | word1 << 32,
                    second = (word2 & 0xFFFFFFFF) | word3 << 32;
    low = BitCast<Words>(Interleave<false>(first, second));
    high = BitCast<Words>(Interleave<true>(first, second));
  }
};

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
