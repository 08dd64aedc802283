// Attention of one query of each sequence: with the keys and values K, V (k, d) of the rows that it sees,
//
//   s = scale K q;  L = logsumexp(s);  p = exp(s - L);  o = (p * m) V;
//   dV = (p * m) do^T;  ds = p * (m * (V do) - do o);  dK = scale ds q^T;  dq = scale ds K.
//
// m is 0 or 1 / (1 - p): the Philox words of bclip_fast/ops/attention/reference.py decide. Queries are (n, H, d), keys
// and values (T, 2, H, d), L is (n, H); all are contiguous, d a multiple of 16. A thread does whole sequences, so
// results are the same bits whatever the number of threads. Throws std::invalid_argument where a size doesn't fit.
#pragma once

#include <cstdint>
#include <string>

namespace bclip::cpu {

struct PooledAttention {
  std::string instruction_set;  // of attention_instruction_sets()
  const void *query, *key_value;
  bool bfloat16;  // else float
  int64_t tokens, sequences, heads, dim;
  const int32_t* bounds;  // (sequences + 1,), rising from 0 to T
  const int64_t* rows;    // (sequences,), each within its bounds
  bool causal;
  double scale;
  double dropout_p;
  uint64_t seed;
};

struct PooledAttentionGradient {
  const void *out_grad, *out;  // (n, H, d)
  const float* lse;
  void *query_grad, *key_value_grad;  // written, zero where a row isn't seen
};

void pooled_attention_forward(const PooledAttention& attention, void* out, float* lse, int threads);
void pooled_attention_backward(const PooledAttention& attention, const PooledAttentionGradient& gradient, int threads);

}  // namespace bclip::cpu
