// The kernels of image_kernels.h. The including file chooses the target, and defines for 64 bytes
// in four lanes of 16:
//   Bytes, Sums: sixteen 32-bit sums, with Sums{} being 0
//   load(from), store(to, Bytes): 64 bytes
//   load_lanes(a, b, c, d), store_lanes(Bytes, to): 16 bytes each, from and to four addresses
//   group(Bytes): within lanes, RGB RGB RGB RGB x4 -> R4 G4 B4 x4
//   ungroup(Bytes): within lanes, RGBx x4 -> RGB x4
//   interleave(const Bytes rows[4], Bytes columns[4]): lane by lane, columns[k] has the bytes
//       4k..4k+3 of each row as quads
//   add(Sums, Bytes, Quad): adds a quad of bytes times the coefficients to each sum
//   round_to_bytes(const Sums[4]): lane by lane, the sums of that lane of all four, in order
//   pack(coefficients): the Quad of four coefficients
#pragma once

namespace bclip::cpu::BCLIP_ISA {

namespace {

void along(const uint8_t* const* rows, const Taps& taps, int num_groups, uint8_t* groups,
           uint8_t* const* out) {
  for (int64_t i = 0; i < num_groups; ++i) {
    store(groups + 64 * i, group(load_lanes(rows[0] + 12 * i, rows[1] + 12 * i, rows[2] + 12 * i,
                                            rows[3] + 12 * i)));
  }
  uint8_t* to[kRowsAtOnce] = {out[0], out[1], out[2], out[3]};
  const Quad* quads = taps.quads;
  for (int x = 0; x < taps.count; x += 4) {
    Sums sums[4];
    for (int i = 0; i < 4; ++i, quads += taps.num_quads) {
      const uint8_t* at = groups + int64_t{64} * taps.first[x + i];
      Sums sum{};
      for (int q = 0; q < taps.num_quads; ++q) sum = add(sum, load(at + 64 * q), quads[q]);
      sums[i] = sum;
    }
    // The next store overwrites the last four bytes of this one.
    store_lanes(ungroup(round_to_bytes(sums)), to);
    for (auto& row : to) row += 12;
  }
}

void across(const uint8_t* const* rows, const Quad* quads, int num_quads, int64_t size,
            uint8_t* out) {
  for (int64_t at = 0; at < size; at += 64) {
    Sums sums[4] = {};
    for (int q = 0; q < num_quads; ++q) {
      Bytes four[4], columns[4];
      for (int i = 0; i < 4; ++i) four[i] = load(rows[4 * q + i] + at);
      interleave(four, columns);
      for (int i = 0; i < 4; ++i) sums[i] = add(sums[i], columns[i], quads[q]);
    }
    const Bytes bytes = round_to_bytes(sums);
    if (size - at >= 64) {
      store(out + at, bytes);
    } else {
      uint8_t last[64];
      store(last, bytes);
      std::memcpy(out + at, last, size - at);
    }
  }
}

}  // namespace

const ResampleKernels kResample = {&pack, &along, &across};

}  // namespace bclip::cpu::BCLIP_ISA
