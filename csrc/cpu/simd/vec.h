// Sixteen floats at once, in registers of the target's own width: one vector of the compiler's extension where a register
// holds them all, pairs of narrower ones elsewhere. (GCC 12 keeps a vector that is wider than the registers in memory and
// copies it eight bytes at a time.) Included after the target is chosen (#pragma GCC target), so everything has internal
// linkage and is inlined. The includer, which knows the target (macros such as __AVX512F__ do not follow the pragma),
// defines BCLIP_AVX512 or BCLIP_AVX2, with <immintrin.h>, where there are such instructions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(BCLIP_AVX512) || defined(BCLIP_AVX2)
#define BCLIP_X86 1
#elif defined(__SSE2__)
#define BCLIP_X86 1
#include <emmintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define BCLIP_NEON 1
#include <arm_neon.h>
#endif

#define BCLIP_MEMBER_INLINE inline __attribute__((always_inline))
#define BCLIP_INLINE static BCLIP_MEMBER_INLINE

namespace {

constexpr int kLanes = 16;

#if defined(BCLIP_AVX512)
constexpr int kRegisterBytes = 64;
#elif defined(BCLIP_AVX2)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

// Two vectors as one of twice as many elements, with the operators of the compiler's vectors: element by element, a
// scalar stands for all elements, and a comparison yields -1 or 0 in each.
template <class Half, class T>
struct Pair {
  Half low, high;

#define BCLIP_BINARY(op)                                                                                               \
  friend BCLIP_MEMBER_INLINE Pair operator op(Pair a, Pair b) { return {a.low op b.low, a.high op b.high}; }           \
  friend BCLIP_MEMBER_INLINE Pair operator op(Pair a, T b) { return {a.low op b, a.high op b}; }                       \
  friend BCLIP_MEMBER_INLINE Pair operator op(T a, Pair b) { return {a op b.low, a op b.high}; }                       \
  friend BCLIP_MEMBER_INLINE Pair& operator op##=(Pair& a, Pair b) { return a = a op b; }                              \
  friend BCLIP_MEMBER_INLINE Pair& operator op##=(Pair& a, T b) { return a = a op b; }
  BCLIP_BINARY(+) BCLIP_BINARY(-) BCLIP_BINARY(*) BCLIP_BINARY(/) BCLIP_BINARY(&) BCLIP_BINARY(|) BCLIP_BINARY(^)
#undef BCLIP_BINARY

#define BCLIP_COMPARISON(op)                                                                                           \
  friend BCLIP_MEMBER_INLINE auto operator op(Pair a, Pair b) { return compared(a.low op b.low, a.high op b.high); }   \
  friend BCLIP_MEMBER_INLINE auto operator op(Pair a, T b) { return compared(a.low op b, a.high op b); }
  BCLIP_COMPARISON(<) BCLIP_COMPARISON(<=) BCLIP_COMPARISON(>) BCLIP_COMPARISON(>=)
  BCLIP_COMPARISON(==) BCLIP_COMPARISON(!=)
#undef BCLIP_COMPARISON

  friend BCLIP_MEMBER_INLINE Pair operator<<(Pair a, int bits) { return {a.low << bits, a.high << bits}; }
  friend BCLIP_MEMBER_INLINE Pair operator>>(Pair a, int bits) { return {a.low >> bits, a.high >> bits}; }
  friend BCLIP_MEMBER_INLINE Pair operator-(Pair a) { return {-a.low, -a.high}; }

 private:
  template <class Mask>
  static BCLIP_MEMBER_INLINE Pair<Mask, int32_t> compared(Mask low, Mask high) {
    static_assert(sizeof(T) == 4, "only vectors of 32-bit elements are compared");
    return {low, high};
  }
};

template <class V>
constexpr bool kIsPair = false;
template <class Half, class T>
constexpr bool kIsPair<Pair<Half, T>> = true;

template <class T, int kBytes, bool kInRegister = kBytes <= kRegisterBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T, int kBytes>
struct VectorOf<T, kBytes, false> {
  using type = Pair<typename VectorOf<T, kBytes / 2>::type, T>;
};

using Lanes = VectorOf<float, 64>::type;
using IntLanes = VectorOf<int32_t, 64>::type;
using Words = VectorOf<uint32_t, 64>::type;
using WideWords = VectorOf<uint64_t, 64>::type;

// Of floats and of 32-bit words in one register.
constexpr int kRegisterLanes = kRegisterBytes / 4;
using FloatRegister = VectorOf<float, kRegisterBytes>::type;
using WordRegister = VectorOf<uint32_t, kRegisterBytes>::type;

// The same bits as another type.
template <class To, class From>
BCLIP_INLINE To as(From from) {
  if constexpr (kIsPair<From>)
    return {as<decltype(To::low)>(from.low), as<decltype(To::high)>(from.high)};
  else
    return (To)from;
}

// Element by element, `a` where the mask is -1 and `b` where it is 0.
template <class Mask, class V>
BCLIP_INLINE V select(Mask mask, V a, V b) {
  if constexpr (kIsPair<V>)
    return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
  else
    return mask ? a : b;
}

template <class V, class T>
BCLIP_INLINE V load_as(const T* from) {
  V vector;
  if constexpr (kIsPair<V>) {
    using Half = decltype(V::low);
    vector = {load_as<Half>(from), load_as<Half>(from + sizeof(Half) / sizeof(T))};
  } else {
    std::memcpy(&vector, from, sizeof vector);
  }
  return vector;
}

template <class T, class V>
BCLIP_INLINE void store_as(T* to, V vector) {
  if constexpr (kIsPair<V>) {
    store_as(to, vector.low);
    store_as(to + sizeof(V) / sizeof(T) / 2, vector.high);
  } else {
    std::memcpy(to, &vector, sizeof vector);
  }
}

BCLIP_INLINE Lanes load(const float* from) { return load_as<Lanes>(from); }
BCLIP_INLINE void store(float* to, Lanes lanes) { store_as(to, lanes); }

BCLIP_INLINE Lanes splat(float value) { return value - Lanes{}; }  // unlike + 0, - 0 changes no number

// 0, 1, 2, ...
template <class V = IntLanes>
BCLIP_INLINE V iota(int start = 0) {
  if constexpr (kIsPair<V>) {
    using Half = decltype(V::low);
    return {iota<Half>(start), iota<Half>(start + static_cast<int>(sizeof(Half) / 4))};
  } else {
    V vector = {};
    for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i) vector[i] = start + i;
    return vector;
  }
}

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
  return select(iota() < static_cast<int32_t>(count), lanes, Lanes{});
}

BCLIP_INLINE Lanes with_lane(Lanes lanes, int64_t lane, float value) {
  return select(iota() == static_cast<int32_t>(lane), splat(value), lanes);
}

BCLIP_INLINE Lanes negate_lane(Lanes lanes, int64_t lane) {
  return select(iota() == static_cast<int32_t>(lane), -lanes, lanes);
}

// Elements of `a`, then of `b`, in the order of the indices.
template <class V, class Index>
BCLIP_INLINE V pick(V a, V b, Index index) {
#ifdef __clang__
  constexpr int count = sizeof(V) / sizeof(a[0]);
  V picked;
  for (int i = 0; i < count; ++i) picked[i] = index[i] < count ? a[index[i]] : b[index[i] - count];
  return picked;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

template <class V>
BCLIP_INLINE float sum_register(V vector) {
  constexpr int count = sizeof(V) / sizeof(float);
  float parts[count];
  std::memcpy(parts, &vector, sizeof parts);
  for (int width = count / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

BCLIP_INLINE float sum(Lanes lanes) {
#if defined(BCLIP_AVX512)
  return _mm512_reduce_add_ps((__m512)lanes);
#elif defined(BCLIP_AVX2)
  const __m256 eight = (__m256)(lanes.low + lanes.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return sum_register((lanes.low.low + lanes.low.high) + (lanes.high.low + lanes.high.high));
#endif
}

BCLIP_INLINE Lanes abs(Lanes lanes) { return as<Lanes>(as<IntLanes>(lanes) & 0x7FFFFFFF); }

// `a` unless it is larger: NaN in `b` stays.
BCLIP_INLINE Lanes larger(Lanes a, Lanes b) { return select(a > b, a, b); }

// bfloat16 in memory: to and from the upper halves of floats.
template <class V>
BCLIP_INLINE V widen(const uint16_t* from) {
  if constexpr (kIsPair<V>) {
    using Half = decltype(V::low);
    return {widen<Half>(from), widen<Half>(from + sizeof(Half) / 4)};
  } else {
#if defined(BCLIP_AVX512)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(BCLIP_AVX2)
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#elif defined(BCLIP_X86)
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (V)_mm_unpacklo_epi16(_mm_setzero_si128(), halves);
#elif defined(BCLIP_NEON)
    return (V)vshll_n_u16(vld1_u16(from), 16);
#else
    VectorOf<uint32_t, sizeof(V)>::type words;
    for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i) words[i] = static_cast<uint32_t>(from[i]) << 16;
    return (V)words;
#endif
  }
}

BCLIP_INLINE Lanes load(const uint16_t* from) { return widen<Lanes>(from); }

// The upper halves of the words.
BCLIP_INLINE void store_upper_halves(uint16_t* to, IntLanes words) {
#if defined(BCLIP_AVX512)
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)words, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
#elif defined(BCLIP_AVX2)
  const IntLanes shifted = words >> 16;  // with the sign, so that nothing saturates
  const __m256i halves = _mm256_packs_epi32((__m256i)shifted.low, (__m256i)shifted.high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(halves, 0xD8));
#elif defined(BCLIP_X86)
  const IntLanes shifted = words >> 16;
  auto* const halves = reinterpret_cast<__m128i*>(to);
  _mm_storeu_si128(halves, _mm_packs_epi32((__m128i)shifted.low.low, (__m128i)shifted.low.high));
  _mm_storeu_si128(halves + 1, _mm_packs_epi32((__m128i)shifted.high.low, (__m128i)shifted.high.high));
#else
  uint32_t each[kLanes];
  store_as(each, words);
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint16_t>(each[i] >> 16);
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN, with the upper bits of its payload, as the processors' own instructions.
BCLIP_INLINE void store(uint16_t* to, Lanes lanes) {
  const Words bits = as<Words>(lanes);
  const Words rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
  store_upper_halves(to, as<IntLanes>(select(lanes == lanes, rounded, bits | 0x400000u)));
}

// Each 64-bit element's lower half times the factor.
template <class V>
BCLIP_INLINE V times(V a, uint32_t factor) {
  if constexpr (kIsPair<V>) {
    return {times(a.low, factor), times(a.high, factor)};
  } else {
#if defined(BCLIP_AVX512)
    return (V)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(factor));
#elif defined(BCLIP_AVX2)
    return (V)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(factor));
#elif defined(BCLIP_X86)
    return (V)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(factor));
#elif defined(BCLIP_NEON)
    return (V)vmull_n_u32(vmovn_u64((uint64x2_t)a), factor);
#else
    return (a & 0xFFFFFFFF) * factor;
#endif
  }
}

// Of each two neighbours, `a`'s first and `b`'s first (or both second ones), one after the other.
template <bool kSecond, class V>
BCLIP_INLINE V interleave(V a, V b) {
  if constexpr (kIsPair<V>) {
    return {interleave<kSecond>(a.low, b.low), interleave<kSecond>(a.high, b.high)};
  } else {
    constexpr int count = sizeof(V) / sizeof(a[0]);
    V index = {};
    for (int i = 0; i < count; ++i) index[i] = i / 2 * 2 + kSecond + (i & 1) * count;
    return pick(a, b, index);
  }
}

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
template <class V>
BCLIP_INLINE V multiply_subtract(V x, V y, V z) {
  if constexpr (kIsPair<V>) {
    return {multiply_subtract(x.low, y.low, z.low), multiply_subtract(x.high, y.high, z.high)};
  } else {
#if defined(BCLIP_AVX512)
    return (V)_mm512_fmsub_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(BCLIP_AVX2)
    return (V)_mm256_fmsub_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(BCLIP_NEON)
    return (V)vfmaq_f32(vnegq_f32((float32x4_t)z), (float32x4_t)x, (float32x4_t)y);
#else
    // The leading 12 bits of both have an exact product.
    using Bits = typename VectorOf<int32_t, sizeof(V)>::type;
    const V x_top = as<V>(as<Bits>(x) & -4096), y_top = as<V>(as<Bits>(y) & -4096);
    return (x_top * y_top - z) + (x_top * (y - y_top) + (x - x_top) * y);
#endif
  }
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
  const IntLanes bits = (as<IntLanes>(shifted) - (0x4B400000 - 127)) << 23;
  power *= as<Lanes>(bits);
  power = select(exponent < -126.f, Lanes{}, power);
  return select(exponent >= 127.5f, splat(__builtin_inff()), power);
}

// 2^x for x <= 64, relative error 1e-7; 2^-126 below.
BCLIP_INLINE Lanes exp2_of(Lanes x) {
  constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
  x = larger(splat(-126.f), x);
  const Lanes shifted = x + round;
  const Lanes f = x - (shifted - round);
  Lanes power = splat(0.0013276472454890609f);  // minimax on [-1/2, 1/2], relative error 7.5e-8
  power = power * f + 0.009675540961325169f;
  power = power * f + 0.05550713092088699f;
  power = power * f + 0.24022120237350464f;
  power = power * f + 0.6931469440460205f;
  power = power * f + 1.0000001192092896f;
  return as<Lanes>(as<IntLanes>(power) + (as<IntLanes>(shifted) << 23));
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
