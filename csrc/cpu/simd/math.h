// Exponentials and logarithms of vectors. The three exponentials differ in range, accuracy and
// instructions.
#pragma once

#include "csrc/cpu/simd/vec.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A number with twice the precision of a float. For a logit in the hundreds, a factor rounded to
// one float would change the fifth digit of the exponential.
struct Factor {
  explicit Factor(double value)
      : high(Set(static_cast<float>(value))),
        low(Set(static_cast<float>(value - static_cast<double>(static_cast<float>(value))))) {}

  Lanes high, low;
};

// x * y - z for a z near the product, rounded once. The compiler would round the expression `x * y
// - z` twice if it needs the product elsewhere too.
template <class V>
BCLIP_INLINE V MulSub(V x, V y, V z) {
  if constexpr (kIsPair<V>) {
    return {MulSub(x.low, y.low, z.low), MulSub(x.high, y.high, z.high)};
  } else {
#if defined(BCLIP_AVX512)
    return (V)_mm512_fmsub_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(BCLIP_AVX2)
    return (V)_mm256_fmsub_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(BCLIP_NEON)
    return (V)vfmaq_f32(vnegq_f32((float32x4_t)z), (float32x4_t)x, (float32x4_t)y);
#else
    // The product of the leading 12 bits of both is exact.
    using Bits = typename VectorOf<int32_t, sizeof(V)>::type;
    const V x_top = BitCast<V>(BitCast<Bits>(x) & -4096),
            y_top = BitCast<V>(BitCast<Bits>(y) & -4096);
    return (x_top * y_top - z) + (x_top * (y - y_top) + (x - x_top) * y);
#endif
  }
}

// 2^(x * factor - offset) for a whole-numbered offset, with a relative error of 1e-7; 0 below
// 2^-126. The fraction is computed without the offset, which would round it away.
BCLIP_INLINE Lanes Exp2Affine(Lanes x, const Factor& factor, Lanes offset) {
  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits.
  constexpr float round = 12582912.f;
  const Lanes exponent = x * factor.high - offset;
  const Lanes shifted = exponent + round;
  const Lanes whole = shifted - round;
  const Lanes f = MulSub(x, factor.high, offset + whole) + x * factor.low;
  // On [-1/2, 1/2]: relative error 6.4e-8, with a mean of 4e-10.
  Lanes power = Set(0.00015196693129837513f);
  power = power * f + 0.0013391304528340697f;
  power = power * f + 0.009619002230465412f;
  power = power * f + 0.055503588169813156f;
  power = power * f + 0.24022643268108368f;
  power = power * f + 0.6931471824645996f;
  power = power * f + 1.f;
  const IntLanes bits = (BitCast<IntLanes>(shifted) - (0x4B400000 - 127)) << 23;
  power *= BitCast<Lanes>(bits);
  power = IfThenElse(exponent < -126.f, Lanes{}, power);
  return IfThenElse(exponent >= 127.5f, Set(__builtin_inff()), power);
}

// 2^x for x <= 64, with a relative error of 1e-7; at least 2^-126.
BCLIP_INLINE Lanes Exp2(Lanes x) {
  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits.
  constexpr float round = 12582912.f;
  x = Max(Set(-126.f), x);
  const Lanes shifted = x + round;
  const Lanes f = x - (shifted - round);
  Lanes power = Set(0.0013276472454890609f);  // minimax on [-1/2, 1/2], relative error 7.5e-8
  power = power * f + 0.009675540961325169f;
  power = power * f + 0.05550713092088699f;
  power = power * f + 0.24022120237350464f;
  power = power * f + 0.6931469440460205f;
  power = power * f + 1.0000001192092896f;
  return BitCast<Lanes>(BitCast<IntLanes>(power) + (BitCast<IntLanes>(shifted) << 23));
}

// log(1 + u) = 2 atanh(u / (2 + u)) for u in [0, 1], with a relative error of 1e-7.
BCLIP_INLINE Lanes Log1pUnit(Lanes u) {
  const Lanes s = u / (u + 2.f);
  const Lanes q = s * s;
  Lanes series = Set(0.2817833423614502f);  // minimax on [0, 1/9], relative error 4e-9
  series = series * q + 0.27960601449012756f;
  series = series * q + 0.40024909377098083f;
  series = series * q + 0.6666631698608398f;
  series = series * q + 2.f;
  return s * series;
}

#ifdef BCLIP_AVX512
// Exp2Affine from instructions that only AVX-512 has. It is short, so it fits between the
// instructions of the matrix unit.
BCLIP_INLINE __m512 Exp2AffineAmx(__m512 x, const Factor& factor, __m512 offset) {
  const __m512 high = (__m512)factor.high;
  const __m512 whole = _mm512_roundscale_ps(_mm512_fmsub_ps(x, high, offset), 8);
  // The fraction is computed without the offset, which would round it away.
  const __m512 rest = _mm512_fmsub_ps(x, high, _mm512_add_ps(offset, whole));
  const __m512 f = _mm512_fmadd_ps(x, (__m512)factor.low, rest);
  __m512 power = _mm512_set1_ps(0.0013274068478494883f);
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.009671497158706188f));
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.055507007986307144f));
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.24022242426872253f));
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(0.6931470036506653f));
  power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(power, whole);
}
#endif

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
