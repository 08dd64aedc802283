// Attention of one query for each sequence, such as the CLS token in the last layer. For each
// sequence and head, with the keys and values K, V (k, d) that the query sees:
//
//   s = scale K q;  L = logsumexp(s);  p = exp(s - L);  o = (p * m) V;
//   dV = (p * m) do^T;  ds = p * (m * (V do) - do o);  dK = scale ds q^T;  dq = scale ds K.
//
// m is 0 or 1 / (1 - p). Philox (philox.h) decides, with the counters of
// bclip_fast/ops/attention/reference.py. Queries are (n, H, d), keys and values (T, 2, H, d), L is
// (n, H). All are contiguous, and d is a multiple of 16. A thread computes whole sequences, so the
// number of threads changes no bit of the result. Throws std::invalid_argument if a size is
// invalid.
#pragma once

#include <cstdint>
#include <string>

namespace bclip::cpu {

struct SingleQueryAttention {
  std::string instruction_set;  // one of attention_instruction_sets()
  const void *query, *key_value;
  bool bfloat16;  // else float
  int64_t tokens, sequences, heads, dim;
  const int32_t* bounds;  // (sequences + 1,), rising from 0 to T
  const int64_t* rows;    // (sequences,): the row of each query, within the bounds of its sequence
  bool causal;
  double scale;
  double dropout_p;
  uint64_t seed;
};

struct SingleQueryAttentionGradient {
  const void *out_grad, *out;  // (n, H, d)
  const float* lse;
  void *query_grad, *key_value_grad;  // written; zero in rows that the query doesn't see
};

void single_query_attention_forward(const SingleQueryAttention& attention, void* out, float* lse,
                                    int threads);
void single_query_attention_backward(const SingleQueryAttention& attention,
                                     const SingleQueryAttentionGradient& gradient, int threads);

}  // namespace bclip::cpu
