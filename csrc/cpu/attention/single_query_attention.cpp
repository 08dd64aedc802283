#include "csrc/single_query_attention.h"

#include <algorithm>
#include <stdexcept>

#include "csrc/cpu/attention/attention_kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd/scratch.h"

namespace bclip::cpu {

namespace {

void check(const SingleQueryAttention& attention) {
  if (attention.tokens < 0 || attention.sequences < 0 || attention.heads < 0 || attention.dim <= 0)
    throw std::invalid_argument("single-query attention: a size is negative");
  if (attention.dim % 16)
    throw std::invalid_argument(
        "single-query attention: the head dimension isn't a multiple of 16");
  const int32_t* bounds = attention.bounds;
  if (bounds[0] != 0 || bounds[attention.sequences] != attention.tokens)
    throw std::invalid_argument("single-query attention: the bounds don't run from 0 to T");
  for (int64_t i = 0; i < attention.sequences; ++i)
    if (attention.rows[i] < bounds[i] || attention.rows[i] >= bounds[i + 1])
      throw std::invalid_argument("single-query attention: a row isn't in its sequence");
}

// Calls run(kernels, sequence, scratch) for each sequence.
template <class Run>
void for_sequences(const SingleQueryAttention& attention, int threads, const Run& run) {
  check(attention);
  const AttentionKernels& chosen = attention_kernels(attention.instruction_set, attention.bfloat16);
  parallel(attention.sequences, threads, [&](int64_t index) {
    const int64_t rows = attention.bounds[index + 1] - attention.bounds[index];
    run(chosen, index,
        reinterpret_cast<float*>(thread_scratch(chosen.single_query_bytes(attention, rows))));
  });
}

}  // namespace

void single_query_attention_forward(const SingleQueryAttention& attention, void* out, float* lse,
                                    int threads) {
  for_sequences(attention, threads,
                [&](const AttentionKernels& chosen, int64_t index, float* scratch) {
                  chosen.single_query_forward(attention, index, out, lse, scratch);
                });
}

void single_query_attention_backward(const SingleQueryAttention& attention,
                                     const SingleQueryAttentionGradient& gradient, int threads) {
  for_sequences(attention, threads,
                [&](const AttentionKernels& chosen, int64_t index, float* scratch) {
                  chosen.single_query_backward(attention, gradient, index, scratch);
                });
}

}  // namespace bclip::cpu
