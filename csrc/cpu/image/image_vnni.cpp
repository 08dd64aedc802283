// Resampling on AVX-512 with VNNI, whose instruction sums four products of a byte and a signed
// byte. So a coefficient is split into c = 65536 * c2 + 256 * c1 + c0 with c0, c1, c2 in [-128,
// 127].
#define BCLIP_ISA vnni
#include "csrc/cpu/image/image_kernels.h"
#include "csrc/cpu/simd/target.h"

#ifdef BCLIP_ISA_AVAILABLE

namespace bclip::cpu::vnni {

namespace {

using Bytes = __m512i;

struct Sums {
  __m512i digits[3];
};

inline Bytes load(const uint8_t* from) { return _mm512_loadu_si512(from); }

inline void store(uint8_t* to, Bytes bytes) { _mm512_storeu_si512(to, bytes); }

inline __m128i lane_at(const uint8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

inline Bytes load_lanes(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(lane_at(b), lane_at(a))),
                            _mm256_set_m128i(lane_at(d), lane_at(c)), 1);
}

inline void store_lanes(Bytes bytes, uint8_t* const* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to[0]), _mm512_castsi512_si128(bytes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to[1]), _mm512_extracti32x4_epi32(bytes, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to[2]), _mm512_extracti32x4_epi32(bytes, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to[3]), _mm512_extracti32x4_epi32(bytes, 3));
}

inline Bytes shuffle(Bytes bytes, __m128i order) {
  return _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(order));
}

inline Bytes group(Bytes bytes) {
  return shuffle(bytes, _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
}

inline Bytes ungroup(Bytes bytes) {
  return shuffle(bytes, _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
}

inline void interleave(const Bytes* rows, Bytes* columns) {
  const Bytes low = _mm512_unpacklo_epi8(rows[0], rows[1]),
              high = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const Bytes next_low = _mm512_unpacklo_epi8(rows[2], rows[3]),
              next_high = _mm512_unpackhi_epi8(rows[2], rows[3]);
  columns[0] = _mm512_unpacklo_epi16(low, next_low);
  columns[1] = _mm512_unpackhi_epi16(low, next_low);
  columns[2] = _mm512_unpacklo_epi16(high, next_high);
  columns[3] = _mm512_unpackhi_epi16(high, next_high);
}

inline Sums add(Sums sums, Bytes bytes, const Quad& quad) {
  for (int i = 0; i < 3; ++i) {
    sums.digits[i] = _mm512_dpbusd_epi32(sums.digits[i], bytes, _mm512_set1_epi32(quad.words[i]));
  }
  return sums;
}

inline Bytes round_to_bytes(const Sums* sums) {
  __m512i values[4];
  for (int k = 0; k < 4; ++k) {
    const __m512i* const digits = sums[k].digits;
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(digits[2], 8), digits[1]);
    const __m512i half = _mm512_set1_epi32(1 << (kPrecision - 1));
    const __m512i sum =
        _mm512_add_epi32(_mm512_slli_epi32(upper, 8), _mm512_add_epi32(digits[0], half));
    values[k] = _mm512_srai_epi32(sum, kPrecision);
  }
  return _mm512_packus_epi16(_mm512_packs_epi32(values[0], values[1]),
                             _mm512_packs_epi32(values[2], values[3]));
}

Quad pack(const int32_t* coefficients) {
  Quad quad{};
  for (int i = 0; i < 4; ++i) {
    int32_t rest = coefficients[i];
    for (int digit = 0; digit < 3; ++digit) {
      const auto low = static_cast<int8_t>(rest & 255);
      rest = (rest - low) >> 8;
      std::memcpy(reinterpret_cast<char*>(&quad.words[digit]) + i, &low, 1);
    }
  }
  return quad;
}

}  // namespace

}  // namespace bclip::cpu::vnni

#include "csrc/cpu/image/image-inl.h"

#endif
