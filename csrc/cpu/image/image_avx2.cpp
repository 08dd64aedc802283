// Resampling on AVX2. It multiplies 16-bit numbers, so a coefficient is split into c = 4096 * high
// + low.
#define BCLIP_ISA avx2
#include "csrc/cpu/image/image_kernels.h"
#include "csrc/cpu/simd/target.h"

#ifdef BCLIP_ISA_AVAILABLE

namespace bclip::cpu::avx2 {

namespace {

struct Bytes {
  __m256i halves[2];
};

struct Sums {
  __m256i halves[2];
};

inline Bytes load(const uint8_t* from) {
  const auto* const at = reinterpret_cast<const __m256i*>(from);
  return {{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}

inline void store(uint8_t* to, const Bytes& bytes) {
  for (int i = 0; i < 2; ++i)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + i, bytes.halves[i]);
}

inline __m128i lane_at(const uint8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

inline Bytes load_lanes(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  return {{_mm256_set_m128i(lane_at(b), lane_at(a)), _mm256_set_m128i(lane_at(d), lane_at(c))}};
}

inline void store_lanes(const Bytes& bytes, uint8_t* const* to) {
  for (int i = 0; i < 2; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[2 * i]),
                     _mm256_castsi256_si128(bytes.halves[i]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[2 * i + 1]),
                     _mm256_extracti128_si256(bytes.halves[i], 1));
  }
}

inline Bytes shuffle(const Bytes& bytes, __m128i order) {
  const __m256i both = _mm256_broadcastsi128_si256(order);
  return {{_mm256_shuffle_epi8(bytes.halves[0], both), _mm256_shuffle_epi8(bytes.halves[1], both)}};
}

inline Bytes group(const Bytes& bytes) {
  return shuffle(bytes, _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
}

inline Bytes ungroup(const Bytes& bytes) {
  return shuffle(bytes, _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
}

inline void interleave(const Bytes* rows, Bytes* columns) {
  for (int i = 0; i < 2; ++i) {
    const __m256i low = _mm256_unpacklo_epi8(rows[0].halves[i], rows[1].halves[i]);
    const __m256i high = _mm256_unpackhi_epi8(rows[0].halves[i], rows[1].halves[i]);
    const __m256i next_low = _mm256_unpacklo_epi8(rows[2].halves[i], rows[3].halves[i]);
    const __m256i next_high = _mm256_unpackhi_epi8(rows[2].halves[i], rows[3].halves[i]);
    columns[0].halves[i] = _mm256_unpacklo_epi16(low, next_low);
    columns[1].halves[i] = _mm256_unpackhi_epi16(low, next_low);
    columns[2].halves[i] = _mm256_unpacklo_epi16(high, next_high);
    columns[3].halves[i] = _mm256_unpackhi_epi16(high, next_high);
  }
}

inline Sums add(Sums sums, const Bytes& bytes, const Quad& quad) {
  __m256i words[4];
  for (int i = 0; i < 4; ++i) words[i] = _mm256_set1_epi32(quad.words[i]);
  for (int i = 0; i < 2; ++i) {
    const __m256i even = _mm256_and_si256(bytes.halves[i], _mm256_set1_epi16(255));
    const __m256i odd = _mm256_srli_epi16(bytes.halves[i], 8);
    const __m256i high =
        _mm256_add_epi32(_mm256_madd_epi16(even, words[0]), _mm256_madd_epi16(odd, words[1]));
    const __m256i low =
        _mm256_add_epi32(_mm256_madd_epi16(even, words[2]), _mm256_madd_epi16(odd, words[3]));
    sums.halves[i] =
        _mm256_add_epi32(sums.halves[i], _mm256_add_epi32(_mm256_slli_epi32(high, 12), low));
  }
  return sums;
}

inline Bytes round_to_bytes(const Sums* sums) {
  Bytes bytes;
  for (int i = 0; i < 2; ++i) {
    __m256i values[4];
    for (int k = 0; k < 4; ++k) {
      const __m256i half = _mm256_set1_epi32(1 << (kPrecision - 1));
      values[k] = _mm256_srai_epi32(_mm256_add_epi32(sums[k].halves[i], half), kPrecision);
    }
    bytes.halves[i] = _mm256_packus_epi16(_mm256_packs_epi32(values[0], values[1]),
                                          _mm256_packs_epi32(values[2], values[3]));
  }
  return bytes;
}

// Even and odd pixels are separate, like their bytes in add().
Quad pack(const int32_t* coefficients) {
  int16_t parts[8];
  for (int i = 0; i < 4; ++i) {
    const int32_t high = (coefficients[i] + 2048) >> 12;
    const int at = i % 2 * 2 + i / 2;
    parts[at] = static_cast<int16_t>(high);
    parts[4 + at] = static_cast<int16_t>(coefficients[i] - high * 4096);
  }
  Quad quad;
  std::memcpy(quad.words, parts, sizeof parts);
  return quad;
}

}  // namespace

}  // namespace bclip::cpu::avx2

#include "csrc/cpu/image/image-inl.h"

#endif
