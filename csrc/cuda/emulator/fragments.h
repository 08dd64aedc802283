// The places of the elements of a fragment, by the formulas of the PTX ISA ("Matrix fragments for
// mma.m16n8k16 with floating point type" and ldmatrix). `i` counts the elements of a lane: two in
// each register of A and B, one in each float of C.
#pragma once

namespace bclip::cuda::emulator {

struct Place {
  int row, column;
};

inline Place place_in_a(int lane, int i) {
  const bool upper = i < 2 || (i >= 4 && i < 6);
  return {lane / 4 + (upper ? 0 : 8), lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
inline Place place_in_b(int lane, int i) {
  return {lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), lane / 4};
}
inline Place place_in_c(int lane, int i) {
  return {lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + (i & 1)};
}

// The place of element i, 0 or 1, in an 8 x 8 matrix that ldmatrix loads.
inline Place place_in_matrix(int lane, int i, bool transposed) {
  const Place place{lane / 4, lane % 4 * 2 + i};
  return transposed ? Place{place.column, place.row} : place;
}

}  // namespace bclip::cuda::emulator
