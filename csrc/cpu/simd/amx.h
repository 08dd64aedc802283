// The matrix unit of x86 (AMX): its configuration, its products and the layouts of their operands.
// Include it after target.h with BCLIP_ISA amx.
#pragma once

#include "csrc/cpu/simd/panel.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

constexpr int64_t kHalf = 16;
constexpr int64_t kStep = kPanel * kPanel;  // elements of a panel for 32 k

// Configures the matrix unit for its lifetime. Tiles 0 to 3 hold results, 4 and 5 the left operand,
// 6 and 7 the right operand. All are 16 rows of 64 bytes. Numbers below 2^-126 are zero for the
// vector units too.
class AmxSession {
 public:
  AmxSession() : mode_(_mm_getcsr()) {
    // Static, because GCC's intrinsic declares a read of only the first 8 bytes.
    static const struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
    _mm_setcsr(mode_ | _MM_FLUSH_ZERO_ON | 0x40 /* denormals are zero */);
  }
  ~AmxSession() {
    _mm_setcsr(mode_);
    _tile_release();
  }
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;

 private:
  const unsigned mode_;
};

// The addresses of 32 rows of a left operand. `low` is the first row and `high` the seventeenth. A
// row has 32 contiguous elements for each step. Rows are `stride` bytes apart, and steps are `next`
// elements apart.
struct Rows {
  Rows(const uint16_t* packed)
      : low(packed), high(packed + kStep / 2), stride(2 * kPanel), next(kStep) {}
  Rows(const uint16_t* matrix, int64_t width)
      : low(matrix), high(matrix + kHalf * width), stride(2 * width), next(kPanel) {}

  const uint16_t *low, *high;
  int64_t stride, next;
};

// Keeps two instructions for the matrix unit from entering the core together. While the core's
// other thread works, and most of all if it uses the matrix unit, such pairs wait for one another.
// On an Emerald Rapids a step of four loads and four products then takes 110 ns without the spacer
// and 63 ns with it. With the core to itself it takes 24 ns either way.
BCLIP_INLINE void amx_spacer() { asm volatile(".rept 12\n\tnop\n\t.endr"); }

// result (32, 32) = or += left (32, 32 steps) right (32 steps, 32). Calls work(step) after each
// step. The right operand is loaded with a streaming hint. The left operand then stays in L1, which
// saves a third of the time. `stride` counts the elements between rows of the result.
template <typename Work>
BCLIP_INLINE void multiply(Rows left, const uint16_t* right, int64_t steps, float* result, bool add,
                           const Work& work, int64_t stride = kPanel) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  if (add) {
    _tile_loadd(0, result, bytes);
    amx_spacer();
    _tile_loadd(1, result + kHalf, bytes);
    amx_spacer();
    _tile_loadd(2, result + kHalf * stride, bytes);
    amx_spacer();
    _tile_loadd(3, result + kHalf * stride + kHalf, bytes);
    amx_spacer();
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps;
       ++step, left.low += left.next, left.high += left.next, right += kStep) {
    _tile_stream_loadd(6, right, 64);
    amx_spacer();
    _tile_loadd(4, left.low, left.stride);
    amx_spacer();
    _tile_stream_loadd(7, right + kStep / 2, 64);
    amx_spacer();
    _tile_loadd(5, left.high, left.stride);
    amx_spacer();
    _tile_dpbf16ps(0, 4, 6);
    amx_spacer();
    _tile_dpbf16ps(1, 4, 7);
    amx_spacer();
    _tile_dpbf16ps(2, 5, 6);
    amx_spacer();
    _tile_dpbf16ps(3, 5, 7);
    amx_spacer();
    work(step);
  }
  _tile_stored(0, result, bytes);
  amx_spacer();
  _tile_stored(1, result + kHalf, bytes);
  amx_spacer();
  _tile_stored(2, result + kHalf * stride, bytes);
  amx_spacer();
  _tile_stored(3, result + kHalf * stride + kHalf, bytes);
}

BCLIP_INLINE void fetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}

// A contiguous matrix (count, width) of features.
struct Features {
  const uint16_t* data;
  int64_t count, width;

  // A mask of the 32 columns from k on: those that exist.
  __mmask32 columns(int64_t k) const { return width - k >= kPanel ? ~0u : (1u << (width - k)) - 1; }

  // 32 elements of a row from column k on, with zeros outside the matrix.
  __m512i load(int64_t row, int64_t k) const {
    return row < count ? _mm512_maskz_loadu_epi16(columns(k), data + row * width + k)
                       : _mm512_setzero_si512();
  }

  // Prefetches 32 elements of each of 32 rows.
  BCLIP_MEMBER_INLINE void fetch(int64_t row, int64_t k) const {
    for (int64_t i = 0; i < kPanel; ++i) BCLIP_ISA::fetch(data + (row + i) * width + k);
  }
};

// Features in single precision, rounded when loaded.
struct SingleFeatures {
  const float* data;
  int64_t count, width;

  __m512i load(int64_t row, int64_t k) const {
    if (row >= count) return _mm512_setzero_si512();
    const __mmask32 present = width - k >= kPanel ? ~0u : (1u << (width - k)) - 1;
    const float* from = data + row * width + k;
    return (__m512i)_mm512_cvtne2ps_pbh(
        _mm512_maskz_loadu_ps(static_cast<__mmask16>(present >> kHalf), from + kHalf),
        _mm512_maskz_loadu_ps(static_cast<__mmask16>(present), from));
  }

  BCLIP_MEMBER_INLINE void fetch(int64_t row, int64_t k) const {
    for (int64_t i = 0; i < kPanel; ++i)
      for (int64_t half : {int64_t{0}, kHalf})
        BCLIP_ISA::fetch(data + (row + i) * width + k + half);
  }
};

// Packs 32 rows as the left operand of X: [D / 32][2][16 rows][32 k].
[[maybe_unused]] void pack_rows(const Features& features, int64_t row, uint16_t* packed) {
  for (int64_t k = 0; k < features.width; k += kPanel)
    for (int64_t i = 0; i < kPanel; ++i, packed += kPanel)
      _mm512_store_si512(packed, features.load(row + i, k));
}

// Transposes a 16 x 16 matrix of 32-bit elements.
void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]),
                  b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88),
                  b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// Packs 32 rows at 32 columns k for K^T, the right operand of X: [2][16 pairs of k][16 rows][2 k].
template <typename AnyFeatures>
BCLIP_INLINE void pack_across_step(const AnyFeatures& features, int64_t row, int64_t k,
                                   uint16_t* packed) {
  for (int64_t half = 0; half < kPanel; half += kHalf) {
    __m512i rows[16];
    for (int64_t i = 0; i < kHalf; ++i) rows[i] = features.load(row + half + i, k);
    transpose(rows);
    for (int64_t i = 0; i < kHalf; ++i, packed += kPanel) _mm512_store_si512(packed, rows[i]);
  }
}

// The right operand of X: [count / 32][D / 32] of these steps.
[[maybe_unused]] void pack_across(const Features& features, int64_t row, int64_t count,
                                  uint16_t* packed) {
  for (int64_t panel = row; panel < row + count; panel += kPanel)
    for (int64_t k = 0; k < features.width; k += kPanel, packed += kStep)
      pack_across_step(features, panel, k, packed);
}

BCLIP_INLINE __m512i interleave(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Packs 32 rows at 32 columns k for K, the right operand of O: [2][16 pairs of rows][16 columns][2
// rows].
template <typename AnyFeatures>
BCLIP_INLINE void pack_pairs_step(const AnyFeatures& features, int64_t row, int64_t k,
                                  uint16_t* packed) {
  for (int64_t i = 0; i < kPanel; i += 2) {
    const __m512i even = features.load(row + i, k), odd = features.load(row + i + 1, k);
    _mm512_store_si512(packed + i * kHalf,
                       interleave(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)));
    _mm512_store_si512(
        packed + kStep / 2 + i * kHalf,
        interleave(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1)));
  }
}

// The right operand of O: [D / 32][count / 32] of these steps.
[[maybe_unused]] void pack_pairs(const Features& features, int64_t row, int64_t count,
                                 uint16_t* packed) {
  for (int64_t k = 0; k < features.width; k += kPanel)
    for (int64_t panel = row; panel < row + count; panel += kPanel, packed += kStep)
      pack_pairs_step(features, panel, k, packed);
}

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
