// Attention within each of the sequences that follow one another in a packed batch. For each
// sequence and head, with Q, K, V (n, d):
//
//   S = scale Q K^T, masked;  L = logsumexp(S);  P = exp(S - L), zero where masked;  O = (P * M) V;
//   dV = (P * M)^T dO;  dS = P * (M * (dO V^T) - rowsum(dO * O));
//   dQ = scale dS K;  dK = scale dS^T Q.
//
// M is 0 or 1 / (1 - p). Philox (philox.h) decides, with the counters of
// bclip_fast/ops/attention/reference.py. qkv is (T, 3, H, d), outputs are (T, H, d) and L is (H,
// T). All are contiguous, and d is a multiple of 16. A thread computes whole heads of whole
// sequences, so the number of threads changes no bit of the result. Throws std::invalid_argument if
// a size is invalid.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bclip::cpu {

// The instruction sets that this machine has for the dtype, best first: "amx" (bfloat16 only),
// "avx512", "avx2", "plain".
std::vector<std::string> attention_instruction_sets(bool bfloat16);

struct Attention {
  std::string instruction_set;  // one of attention_instruction_sets()
  const void* qkv;
  bool bfloat16;  // else float
  int64_t rows, heads, dim;
  const int32_t* bounds;  // (sequences + 1,), rising from 0 to T
  int64_t sequences;
  const uint8_t* key_mask;  // (T,), 0 for a key that no query may attend to; or null
  bool causal;
  double scale;
  double dropout_p;
  uint64_t seed;
};

struct AttentionGradient {
  const void *out_grad, *out;  // (T, H, d), in the dtype of qkv
  const float* lse;            // (H, T)
  void* qkv_grad;              // (T, 3, H, d), written
};

// Writes out (T, H, d) and lse (H, T).
void attention_forward(const Attention& attention, void* out, float* lse, int threads);
void attention_backward(const Attention& attention, const AttentionGradient& gradient, int threads);

}  // namespace bclip::cpu
