// Shared parts of the checks: inputs, outputs, and the comparison with loops in double precision.
//
// Every bound is derived and not measured. To first order, it is the unit roundoff times the number
// of roundings on the way to a result, times the size of the terms.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace bclip::cpu {}

namespace checks {

// The contracts of csrc/*.h.
using namespace bclip::cpu;

constexpr double kUnit = 0x1p-24;     // unit roundoff of float
constexpr double kHalfUnit = 0x1p-8;  // unit roundoff of bfloat16
// Relative error of the kernels' exponentials, from csrc/cpu/simd/math.h.
constexpr double kExp = 1e-7;
constexpr int64_t kThreads = 3;

// A fault in the inputs of the reference, to prove that the comparison detects errors.
enum class Fault {
  kNone,
  kEntries,   // one entry in five of each input differs by 1/2
  kRounding,  // each input is truncated to bfloat16, as if a float kernel computed in bfloat16
};

extern Fault fault;
extern std::string instruction_set;

// Compares one result with its exact value. `quantity` names the check and the result.
void compare(const std::string& quantity, double value, double exact, double bound);

// Checks a property that no fault of the reference can break.
void expect(const std::string& property, bool holds);

template <typename Call>
void expect_refusal(const std::string& property, const Call& call) {
  bool refused = false;
  try {
    call();
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(property, refused);
}

inline double value_of(float number) { return static_cast<double>(number); }

inline double value_of(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return static_cast<double>(number);
}

template <typename Stored>
Stored stored(double number);

template <>
inline float stored<float>(double number) {
  return static_cast<float>(number);
}

template <>
inline uint16_t stored<uint16_t>(double number) {
  const float single = static_cast<float>(number);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <typename Stored>
constexpr double unit_of() {
  return sizeof(Stored) == 2 ? kHalfUnit : kUnit;
}

template <typename Stored>
std::string name_of() {
  return sizeof(Stored) == 2 ? "bf16" : "fp32";
}

// The same numbers on every machine (SplitMix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t word = state_ += 0x9E3779B97F4A7C15;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9;
    word = (word ^ word >> 27) * 0x94D049BB133111EB;
    return word ^ word >> 31;
  }

  double uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(bits() >> 11) * 0x1p-53;
  }

  int64_t below(int64_t end) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(end)); }

 private:
  uint64_t state_;
};

// Values for a kernel, between margins of NaN (or of a pattern, for a type without NaN). A read
// outside changes the results, and intact() detects a write outside. The first value is aligned to
// no more than its size.
template <typename T>
class Buffer {
 public:
  // Holds only NaN.
  explicit Buffer(int64_t size) : size_(size), memory_(size + 2 * kMargin + 1, unwritten()) {}

  // Holds uniformly distributed values.
  Buffer(int64_t size, Random& random, double low, double high) : Buffer(size) {
    for (int64_t i = 0; i < size; ++i) data()[i] = stored<T>(random.uniform(low, high));
  }

  T* data() { return memory_.data() + kMargin + 1; }
  const T* data() const { return memory_.data() + kMargin + 1; }
  int64_t size() const { return size_; }
  T& operator[](int64_t index) { return data()[index]; }
  const T& operator[](int64_t index) const { return data()[index]; }

  void fill(T value) { std::fill_n(data(), size_, value); }

  bool intact() const {
    const T pattern = unwritten();
    const auto is_pattern = [&](const T& value) {
      return std::memcmp(&value, &pattern, sizeof value) == 0;
    };
    return std::all_of(memory_.begin(), memory_.begin() + kMargin + 1, is_pattern) &&
           std::all_of(memory_.end() - kMargin, memory_.end(), is_pattern);
  }

  bool same_bits(const Buffer& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0;
  }

  static T unwritten() {
    if constexpr (std::is_floating_point_v<T>) return std::numeric_limits<T>::quiet_NaN();
    return static_cast<T>(0x7FC1);  // NaN as bfloat16
  }

 private:
  static constexpr int64_t kMargin = 64;
  int64_t size_;
  std::vector<T> memory_;
};

inline double cut_off(double number) {
  const float single = static_cast<float>(number);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  return value_of(static_cast<uint16_t>(bits >> 16));
}

// An input as the reference sees it.
template <typename T>
std::vector<double> exact(const Buffer<T>& buffer) {
  std::vector<double> values(buffer.size());
  for (int64_t i = 0; i < buffer.size(); ++i) {
    values[i] = value_of(buffer[i]);
    if (fault == Fault::kEntries && i % 5 == 2) values[i] += 0.5;
    if (fault == Fault::kRounding) values[i] = cut_off(values[i]);
  }
  return values;
}

// Word `index % 4` of Philox4x32-10 at counter (index / 4, row, third, 0).
inline uint32_t philox(uint64_t seed, uint32_t index, uint32_t row, uint32_t third) {
  uint32_t counter[4] = {index / 4, row, third, 0};
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t one = uint64_t{0xD2511F53} * counter[0], two = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(two >> 32) ^ counter[1] ^ low, static_cast<uint32_t>(two),
        static_cast<uint32_t>(one >> 32) ^ counter[3] ^ high, static_cast<uint32_t>(one)};
    std::copy_n(next, 4, counter);
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  return counter[index % 4];
}

// Calls check(a case, 0 in the type of the elements) for each case in float and bfloat16.
template <typename Case, typename Check>
void for_each_dtype(const std::vector<Case>& cases, const Check& check) {
  for (const Case& of : cases) {
    check(of, float());
    check(of, uint16_t());
  }
}

void check_attention();
void check_single_query_attention();
void check_contrastive();
void check_pointwise();
void check_ranking();
void check_image();

}  // namespace checks
