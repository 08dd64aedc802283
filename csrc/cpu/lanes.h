// Sixteen floats at once through the compiler's vector extension, which lowers them to whatever the target has. Included
// after the target is chosen (#pragma GCC target), so everything has internal linkage and is inlined. The includer, which
// knows the target, defines BCLIP_LANES_AVX512 or BCLIP_LANES_FMA (with <immintrin.h>) where there are such instructions.
#pragma once

#include <cstdint>
#include <cstring>

#define BCLIP_MEMBER_INLINE inline __attribute__((always_inline))
#define BCLIP_INLINE static BCLIP_MEMBER_INLINE

namespace {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));

BCLIP_INLINE Lanes splat(float value) { return value - Lanes{}; }  // unlike + 0, - 0 changes no number

BCLIP_INLINE Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

BCLIP_INLINE void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

BCLIP_INLINE Lanes load_first(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  float padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

BCLIP_INLINE void store_first(float* to, Lanes lanes, int64_t count) {
  if (count >= kLanes) return store(to, lanes);
  float padded[kLanes];
  store(padded, lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

BCLIP_INLINE Lanes zero_from(Lanes lanes, int64_t count) {
  constexpr IntLanes index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return index < static_cast<int32_t>(count) ? lanes : Lanes{};
}

BCLIP_INLINE Lanes with_lane(Lanes lanes, int64_t lane, float value) {
  lanes[lane] = value;
  return lanes;
}

BCLIP_INLINE float sum(Lanes lanes) {
  float parts[kLanes];
  store(parts, lanes);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

BCLIP_INLINE Lanes abs(Lanes lanes) { return lanes < 0.f ? -lanes : lanes; }

// A number to twice the precision of a float: where a logit is in the hundreds, one float's rounding of the factor
// would show in the fifth digit of its exponential.
struct Factor {
  explicit Factor(double value)
      : high(splat(static_cast<float>(value))),
        low(splat(static_cast<float>(value - static_cast<double>(static_cast<float>(value))))) {}

  Lanes high, low;
};

// x * y - z for a z near the product, rounded once. Asked for by name: of `x * y - z` the compiler makes two roundings
// where it needs the product elsewhere, too.
BCLIP_INLINE Lanes multiply_subtract(Lanes x, Lanes y, Lanes z) {
#if defined(BCLIP_LANES_AVX512)
  return (Lanes)_mm512_fmsub_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(BCLIP_LANES_FMA)
  __m256 a[2], b[2], c[2];
  std::memcpy(a, &x, sizeof a);
  std::memcpy(b, &y, sizeof b);
  std::memcpy(c, &z, sizeof c);
  for (int i = 0; i < 2; ++i) a[i] = _mm256_fmsub_ps(a[i], b[i], c[i]);
  std::memcpy(&x, a, sizeof a);
  return x;
#elif defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_fmaf(x[i], y[i], -z[i]);
  return x;
#else
  // The leading 12 bits of both have an exact product.
  const Lanes x_top = (Lanes)((IntLanes)x & -4096), y_top = (Lanes)((IntLanes)y & -4096);
  return (x_top * y_top - z) + (x_top * (y - y_top) + (x - x_top) * y);
#endif
}

// 2^(x * factor - offset) for a whole-numbered offset, within 1e-7 relative; 0 below 2^-126. The fraction is taken before
// the offset could round it away.
BCLIP_INLINE Lanes exp2_affine(Lanes x, const Factor& factor, Lanes offset) {
  constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
  const Lanes exponent = x * factor.high - offset;
  const Lanes shifted = exponent + round;
  const Lanes whole = shifted - round;
  const Lanes f = multiply_subtract(x, factor.high, offset + whole) + x * factor.low;
  Lanes power = splat(0.00015196693129837513f);  // on [-1/2, 1/2]; relative error 6.4e-8, 4e-10 in the mean
  power = power * f + 0.0013391304528340697f;
  power = power * f + 0.009619002230465412f;
  power = power * f + 0.055503588169813156f;
  power = power * f + 0.24022643268108368f;
  power = power * f + 0.6931471824645996f;
  power = power * f + 1.f;
  const IntLanes bits = ((IntLanes)shifted - (0x4B400000 - 127)) << 23;
  power *= (Lanes)bits;
  power = exponent < -126.f ? Lanes{} : power;
  return exponent >= 127.5f ? splat(__builtin_inff()) : power;
}

// log(1 + u) for u in [0, 1], relative error 1e-7: 2 atanh(u / (2 + u)).
BCLIP_INLINE Lanes log1p_unit(Lanes u) {
  const Lanes s = u / (u + 2.f);
  const Lanes q = s * s;
  Lanes series = splat(0.2817833423614502f);  // minimax on [0, 1/9], relative error 4e-9
  series = series * q + 0.27960601449012756f;
  series = series * q + 0.40024909377098083f;
  series = series * q + 0.6666631698608398f;
  series = series * q + 2.f;
  return s * series;
}

}  // namespace
