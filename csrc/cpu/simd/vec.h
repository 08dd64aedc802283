// Vectors of sixteen 32-bit numbers, in registers of the target's own width. If one register holds
// them all, a vector is one of the compiler's vector extension. Otherwise it is a pair of narrower
// vectors. GCC 12 would keep a vector that is wider than the registers in memory, and copy it eight
// bytes at a time. The operations have Highway's names.
//
// Include it after target.h. All of it has internal linkage and is inlined.
#pragma once

#include "csrc/cpu/simd/target.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

constexpr int kLanes = 16;

#if defined(BCLIP_AVX512)
constexpr int kRegisterBytes = 64;
#elif defined(BCLIP_AVX2)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

// Two vectors as one with twice as many elements. It has the operators of the compiler's vectors,
// which act element by element. A scalar operand applies to every element. A comparison yields -1
// or 0 in each element.
template <class Half, class T>
struct Pair {
  Half low, high;

  // clang-format off
#define BCLIP_BINARY(op)                                                                         \
  friend BCLIP_MEMBER_INLINE Pair operator op(Pair a, Pair b) {                                  \
    return {a.low op b.low, a.high op b.high};                                                   \
  }                                                                                              \
  friend BCLIP_MEMBER_INLINE Pair operator op(Pair a, T b) { return {a.low op b, a.high op b}; } \
  friend BCLIP_MEMBER_INLINE Pair operator op(T a, Pair b) { return {a op b.low, a op b.high}; } \
  friend BCLIP_MEMBER_INLINE Pair& operator op##=(Pair& a, Pair b) { return a = a op b; }        \
  friend BCLIP_MEMBER_INLINE Pair& operator op##=(Pair& a, T b) { return a = a op b; }
  BCLIP_BINARY(+) BCLIP_BINARY(-) BCLIP_BINARY(*) BCLIP_BINARY(/)
  BCLIP_BINARY(&) BCLIP_BINARY(|) BCLIP_BINARY(^)
#undef BCLIP_BINARY

#define BCLIP_COMPARISON(op)                                    \
  friend BCLIP_MEMBER_INLINE auto operator op(Pair a, Pair b) { \
    return compared(a.low op b.low, a.high op b.high);          \
  }                                                             \
  friend BCLIP_MEMBER_INLINE auto operator op(Pair a, T b) {    \
    return compared(a.low op b, a.high op b);                   \
  }
  BCLIP_COMPARISON(<) BCLIP_COMPARISON(<=) BCLIP_COMPARISON(>) BCLIP_COMPARISON(>=)
  BCLIP_COMPARISON(==) BCLIP_COMPARISON(!=)
#undef BCLIP_COMPARISON
      // clang-format on

      friend BCLIP_MEMBER_INLINE Pair operator<<(Pair a, int bits) {
    return {a.low << bits, a.high << bits};
  }
  friend BCLIP_MEMBER_INLINE Pair operator>>(Pair a, int bits) {
    return {a.low >> bits, a.high >> bits};
  }
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

// One register of floats, and of 32-bit words.
constexpr int kRegisterLanes = kRegisterBytes / 4;
using FloatRegister = VectorOf<float, kRegisterBytes>::type;
using WordRegister = VectorOf<uint32_t, kRegisterBytes>::type;

// Reinterprets the bits as another type.
template <class To, class From>
BCLIP_INLINE To BitCast(From from) {
  if constexpr (kIsPair<From>)
    return {BitCast<decltype(To::low)>(from.low), BitCast<decltype(To::high)>(from.high)};
  else
    return (To)from;
}

// Takes each element from `a` if the mask is -1, and from `b` if it is 0.
template <class Mask, class V>
BCLIP_INLINE V IfThenElse(Mask mask, V a, V b) {
  if constexpr (kIsPair<V>)
    return {IfThenElse(mask.low, a.low, b.low), IfThenElse(mask.high, a.high, b.high)};
  else
    return mask ? a : b;
}

// Loads a vector of any type from memory of another type.
template <class V, class T>
BCLIP_INLINE V LoadAs(const T* from) {
  V vector;
  if constexpr (kIsPair<V>) {
    using Half = decltype(V::low);
    vector = {LoadAs<Half>(from), LoadAs<Half>(from + sizeof(Half) / sizeof(T))};
  } else {
    std::memcpy(&vector, from, sizeof vector);
  }
  return vector;
}

template <class T, class V>
BCLIP_INLINE void StoreAs(T* to, V vector) {
  if constexpr (kIsPair<V>) {
    StoreAs(to, vector.low);
    StoreAs(to + sizeof(V) / sizeof(T) / 2, vector.high);
  } else {
    std::memcpy(to, &vector, sizeof vector);
  }
}

BCLIP_INLINE Lanes Load(const float* from) { return LoadAs<Lanes>(from); }
BCLIP_INLINE void Store(float* to, Lanes lanes) { StoreAs(to, lanes); }

BCLIP_INLINE Lanes Set(float value) {
  return value - Lanes{};
}  // x - 0 is x for every x, but -0 + 0 is +0

// start, start + 1, start + 2, ...
template <class V = IntLanes>
BCLIP_INLINE V Iota(int start = 0) {
  if constexpr (kIsPair<V>) {
    using Half = decltype(V::low);
    return {Iota<Half>(start), Iota<Half>(start + static_cast<int>(sizeof(Half) / 4))};
  } else {
    V vector = {};
    for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i) vector[i] = start + i;
    return vector;
  }
}

// The first `count` elements from memory, and zeros after them.
BCLIP_INLINE Lanes LoadN(const float* from, int64_t count) {
  if (count >= kLanes) return Load(from);
  float padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return Load(padded);
}

// Stores only the first `count` elements.
BCLIP_INLINE void StoreN(float* to, Lanes lanes, int64_t count) {
  if (count >= kLanes) return Store(to, lanes);
  float padded[kLanes];
  Store(padded, lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// The first `count` elements, and zeros after them.
BCLIP_INLINE Lanes KeepFirstN(Lanes lanes, int64_t count) {
  return IfThenElse(Iota() < static_cast<int32_t>(count), lanes, Lanes{});
}

BCLIP_INLINE Lanes InsertLane(Lanes lanes, int64_t lane, float value) {
  return IfThenElse(Iota() == static_cast<int32_t>(lane), Set(value), lanes);
}

BCLIP_INLINE Lanes NegateLane(Lanes lanes, int64_t lane) {
  return IfThenElse(Iota() == static_cast<int32_t>(lane), -lanes, lanes);
}

// Picks elements by index from `a` followed by `b`.
template <class V, class Index>
BCLIP_INLINE V TwoTablesLookupLanes(V a, V b, Index index) {
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
BCLIP_INLINE float ReduceSumOfRegister(V vector) {
  constexpr int count = sizeof(V) / sizeof(float);
  float parts[count];
  std::memcpy(parts, &vector, sizeof parts);
  for (int width = count / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

BCLIP_INLINE float ReduceSum(Lanes lanes) {
#if defined(BCLIP_AVX512)
  return _mm512_reduce_add_ps((__m512)lanes);
#elif defined(BCLIP_AVX2)
  const __m256 eight = (__m256)(lanes.low + lanes.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return ReduceSumOfRegister((lanes.low.low + lanes.low.high) + (lanes.high.low + lanes.high.high));
#endif
}

BCLIP_INLINE Lanes Abs(Lanes lanes) {
  return BitCast<Lanes>(BitCast<IntLanes>(lanes) & 0x7FFFFFFF);
}

// The larger element, or `b` if one of them is NaN.
BCLIP_INLINE Lanes Max(Lanes a, Lanes b) { return IfThenElse(a > b, a, b); }

// The products of the lower halves of 64-bit elements and the factor.
template <class V>
BCLIP_INLINE V MulEven(V a, uint32_t factor) {
  if constexpr (kIsPair<V>) {
    return {MulEven(a.low, factor), MulEven(a.high, factor)};
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

// Takes the even (or the odd) elements of `a` and `b`, alternately.
template <bool kOdd, class V>
BCLIP_INLINE V Interleave(V a, V b) {
  if constexpr (kIsPair<V>) {
    return {Interleave<kOdd>(a.low, b.low), Interleave<kOdd>(a.high, b.high)};
  } else {
    constexpr int count = sizeof(V) / sizeof(a[0]);
    V index = {};
    for (int i = 0; i < count; ++i) index[i] = i / 2 * 2 + kOdd + (i & 1) * count;
    return TwoTablesLookupLanes(a, b, index);
  }
}

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
