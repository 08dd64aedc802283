// Dropout of attention weights on a CPU.
#pragma once

#include "csrc/cpu/attention/attention_kernels.h"
#include "csrc/cpu/simd/panel.h"
#include "csrc/cpu/simd/philox_vec.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

// The weights of a head that dropout keeps. The first two rounds of Philox and half of the third
// depend on either the key or the query, so they are computed once. Each step computes eight
// counters, which decide about 32 keys.
class HeadDropout {
 public:
  static int64_t bytes(const Head& head) {
    return head.dropout ? panels_of(head.rows) * kTableWords * sizeof(uint64_t) : 0;
  }

  HeadDropout(const Head& head, char* tables)
      : head_(head), tables_(reinterpret_cast<uint64_t*>(tables)) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
      keys_[round][0] = head.seed[0] + round * kPhiloxStep0;
      keys_[round][1] = head.seed[1] + round * kPhiloxStep1;
    }
    const uint64_t product = uint64_t{kPhiloxFactor2} * head.head;
    first_row_ = static_cast<uint32_t>(product >> 32) ^ keys_[0][0];
    if (!head.dropout) return;
    for (int64_t panel = 0; panel < panels_of(head.rows); ++panel) {
      const WideWords counter = LoadAs<WideWords>(kPhiloxOrder) + static_cast<uint64_t>(8 * panel);
      const WideWords by_first = MulEven(counter, kPhiloxFactor0);
      const WideWords by_second = MulEven((by_first >> 32) ^ keys_[0][1], kPhiloxFactor2);
      const WideWords next = MulEven(
          (by_second >> 32) ^ (static_cast<uint32_t>(product) ^ keys_[1][0]), kPhiloxFactor0);
      uint64_t* const table = tables_ + panel * kTableWords;
      StoreAs(table, by_first);
      StoreAs(table + 8, by_second ^ keys_[2][0]);
      StoreAs(table + 16, (next >> 32) ^ keys_[2][1]);
      StoreAs(table + 24, next);
    }
  }

  // -1 in the lanes of the keys that query `row` of the sequence keeps, for the 32 keys of a panel.
  BCLIP_MEMBER_INLINE void keep(int64_t row, int64_t panel, IntLanes kept[2]) const {
    const uint64_t product =
        uint64_t{kPhiloxFactor0} * (first_row_ ^ (head_.first_row + static_cast<uint32_t>(row)));
    const uint64_t* const table = tables_ + panel * kTableWords;
    const WideWords mixed =
        MulEven(LoadAs<WideWords>(table) ^ (product >> 32 ^ keys_[1][1]), kPhiloxFactor2);
    PhiloxVec random;
    random.word0 = (mixed >> 32) ^ LoadAs<WideWords>(table + 8);
    random.word1 = mixed;
    random.word2 = LoadAs<WideWords>(table + 16) ^ (product & 0xFFFFFFFF);
    random.word3 = LoadAs<WideWords>(table + 24);
    for (int round = 3; round < kPhiloxRounds; ++round)
      random.Round(keys_[round][0], keys_[round][1]);
    Words low, high;
    random.Interleaved(low, high);
    kept[0] = low >= head_.threshold;
    kept[1] = high >= head_.threshold;
  }

 private:
  static constexpr int64_t kTableWords = 32;  // per panel: four vectors

  const Head& head_;
  uint64_t* const tables_;
  uint64_t keys_[kPhiloxRounds][2];
  uint32_t first_row_;
};

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
