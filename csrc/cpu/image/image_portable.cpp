// Resampling for any processor.
#define BCLIP_ISA portable
#include "csrc/cpu/image/image_kernels.h"
#include "csrc/cpu/simd/target.h"

#ifdef BCLIP_ISA_AVAILABLE

namespace bclip::cpu::portable {

namespace {

struct Bytes {
  uint8_t at[64];
};

struct Sums {
  int32_t at[16];
};

inline Bytes load(const uint8_t* from) {
  Bytes bytes;
  std::memcpy(bytes.at, from, 64);
  return bytes;
}

inline void store(uint8_t* to, const Bytes& bytes) { std::memcpy(to, bytes.at, 64); }

inline Bytes load_lanes(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  Bytes bytes;
  const uint8_t* const from[] = {a, b, c, d};
  for (int lane = 0; lane < 4; ++lane) std::memcpy(bytes.at + 16 * lane, from[lane], 16);
  return bytes;
}

inline void store_lanes(const Bytes& bytes, uint8_t* const* to) {
  for (int lane = 0; lane < 4; ++lane) std::memcpy(to[lane], bytes.at + 16 * lane, 16);
}

inline Bytes group(const Bytes& bytes) {
  Bytes result{};
  for (int lane = 0; lane < 64; lane += 16)
    for (int color = 0; color < 3; ++color)
      for (int i = 0; i < 4; ++i) result.at[lane + 4 * color + i] = bytes.at[lane + 3 * i + color];
  return result;
}

inline Bytes ungroup(const Bytes& bytes) {
  Bytes result{};
  for (int lane = 0; lane < 64; lane += 16)
    for (int i = 0; i < 4; ++i) std::memcpy(result.at + lane + 3 * i, bytes.at + lane + 4 * i, 3);
  return result;
}

inline void interleave(const Bytes* rows, Bytes* columns) {
  for (int lane = 0; lane < 64; lane += 16)
    for (int i = 0; i < 16; ++i)
      for (int row = 0; row < 4; ++row)
        columns[i / 4].at[lane + i % 4 * 4 + row] = rows[row].at[lane + i];
}

inline Sums add(Sums sums, const Bytes& bytes, const Quad& quad) {
  for (int i = 0; i < 16; ++i)
    for (int tap = 0; tap < 4; ++tap) sums.at[i] += bytes.at[4 * i + tap] * quad.words[tap];
  return sums;
}

inline Bytes round_to_bytes(const Sums* sums) {
  Bytes bytes;
  for (int lane = 0; lane < 4; ++lane)
    for (int i = 0; i < 16; ++i) {
      const int32_t sum = sums[i / 4].at[4 * lane + i % 4] + (1 << (kPrecision - 1));
      bytes.at[16 * lane + i] = static_cast<uint8_t>(std::clamp(sum >> kPrecision, 0, 255));
    }
  return bytes;
}

Quad pack(const int32_t* coefficients) {
  return {{coefficients[0], coefficients[1], coefficients[2], coefficients[3]}};
}

}  // namespace

}  // namespace bclip::cpu::portable

#include "csrc/cpu/image/image-inl.h"

#endif
