// Transposes of small matrices in registers, and reductions of sixteen rows at a time, which are
// built on them.
#pragma once

#include "csrc/cpu/simd/vec.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

// Exchanges the off-diagonal squares of a square matrix whose rows are registers.
template <int kSquare>
BCLIP_INLINE void exchange(WordRegister* rows) {
  if constexpr (kSquare < kRegisterLanes) {
    WordRegister first = {}, second = {};  // indices into the pair of rows
    for (uint32_t i = 0; i < kRegisterLanes; ++i) {
      first[i] = i & kSquare ? i - kSquare + kRegisterLanes : i;
      second[i] = i & kSquare ? i + kRegisterLanes : i + kSquare;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRegisterLanes; ++i) {
      if (i & kSquare) continue;
      const WordRegister above = rows[i], below = rows[i + kSquare];
      rows[i] = TwoTablesLookupLanes(above, below, first);
      rows[i + kSquare] = TwoTablesLookupLanes(above, below, second);
    }
  }
}

// Transposes a square matrix whose rows are registers, by exchanging squares of growing size.
BCLIP_INLINE void transpose(WordRegister* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
  exchange<8>(rows);
}

// Transposes a 16 x 16 matrix of 32-bit elements of any type. Strides count elements.
BCLIP_INLINE void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  const auto* const source = static_cast<const uint32_t*>(from);
  auto* const target = static_cast<uint32_t*>(to);
  for (int64_t i = 0; i < kLanes; i += kRegisterLanes)
    for (int64_t j = 0; j < kLanes; j += kRegisterLanes) {
      WordRegister rows[kRegisterLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kRegisterLanes; ++k)
        rows[k] = LoadAs<WordRegister>(source + (i + k) * from_stride + j);
      transpose(rows);
#pragma GCC unroll 16
      for (int k = 0; k < kRegisterLanes; ++k) StoreAs(target + (j + k) * to_stride + i, rows[k]);
    }
}

// Joins the registers of a vector into one.
template <class V, class Join>
BCLIP_INLINE FloatRegister join_halves(V vector, const Join& join) {
  if constexpr (kIsPair<V>)
    return join_halves(join(vector.low, vector.high), join);
  else
    return vector;
}

// Joins the elements of each of 16 rows. Lane i of the result belongs to row i. `join` takes
// vectors of any width. Sixteen rows at a time hide the latency that the steps of a single row
// would expose.
template <class Join>
BCLIP_INLINE Lanes reduce_rows(const Lanes* rows, const Join& join) {
  float joined[kLanes];
  for (int first = 0; first < kLanes; first += kRegisterLanes) {
    WordRegister parts[kRegisterLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kRegisterLanes; ++i)
      parts[i] = (WordRegister)join_halves(rows[first + i], join);
    transpose(parts);
#pragma GCC unroll 4
    for (int width = kRegisterLanes / 2; width; width /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i)
        parts[i] = (WordRegister)join((FloatRegister)parts[i], (FloatRegister)parts[i + width]);
    StoreAs(joined + first, parts[0]);
  }
  return Load(joined);
}

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
