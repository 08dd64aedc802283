// Philox4x32-10, the counter-based random numbers of Salmon et al. 2011 ("Parallel random numbers:
// as easy as 1, 2, 3"). All of our dropout draws from it: on CPUs, in CUDA and in bclip_fast/ops
// (philox.py, Triton).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BCLIP_HOST_DEVICE __host__ __device__
#else
#define BCLIP_HOST_DEVICE
#endif

namespace bclip {

constexpr int kPhiloxRounds = 10;
// The factors for words 0 and 2 in each round.
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53, kPhiloxFactor2 = 0xCD9E8D57;
// The differences between one round's key and the next.
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9, kPhiloxStep1 = 0xBB67AE85;

struct PhiloxWords {
  uint32_t word0, word1, word2, word3;
};

BCLIP_HOST_DEVICE inline uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);  // a 64-bit product would take more instructions
#else
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
#endif
}

// The four random words of a counter under a key of 64 bits.
BCLIP_HOST_DEVICE inline PhiloxWords philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                            uint32_t c3) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = high_product(kPhiloxFactor0, c0), low0 = kPhiloxFactor0 * c0;
    const uint32_t high2 = high_product(kPhiloxFactor2, c2), low2 = kPhiloxFactor2 * c2;
    c0 = high2 ^ c1 ^ key0;
    c1 = low2;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
  }
  return {c0, c1, c2, c3};
}

}  // namespace bclip
