// The kernels for one head of one sequence, compiled once per instruction set and called by
// attention.cpp.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/attention.h"
#include "csrc/cpu/simd/isa.h"
#include "csrc/single_query_attention.h"

namespace bclip::cpu {

struct Head {
  const void *query, *key, *value;  // (rows, dim); a row is `stride` elements after the one before
  int64_t stride, rows, dim;
  const uint8_t* key_mask;  // (rows,) or null
  bool causal;
  float scale;
  bool dropout;
  uint32_t threshold;  // floor(p * 2^32)
  float kept;          // 1 / (1 - p)
  uint32_t seed[2];
  uint32_t head, first_row;  // the head's number and the sequence's first row, for the random words
};

struct HeadOutput {
  void* out;
  int64_t stride;
  float* lse;  // (rows,)
};

struct HeadGradient {
  const void *out_grad, *out;
  int64_t out_stride;
  const float* lse;
  void *query, *key, *value;
  int64_t stride;
};

struct AttentionKernels {
  int64_t (*forward_bytes)(const Head&);  // the size of the scratch, which is aligned to 64 bytes
  void (*forward)(const Head&, const HeadOutput&, char* scratch);
  int64_t (*backward_bytes)(const Head&);
  void (*backward)(const Head&, const HeadGradient&, char* scratch);
  // For all heads of a sequence of `rows` rows.
  int64_t (*single_query_bytes)(const SingleQueryAttention&, int64_t rows);
  void (*single_query_forward)(const SingleQueryAttention&, int64_t sequence, void* out, float* lse,
                               float* scratch);
  void (*single_query_backward)(const SingleQueryAttention&, const SingleQueryAttentionGradient&,
                                int64_t sequence, float* scratch);
};

BCLIP_DECLARE_KERNELS(AttentionKernels, kFloatAttention, float_attention)
BCLIP_DECLARE_KERNELS(AttentionKernels, kBfloat16Attention, bfloat16_attention)
#ifdef BCLIP_AMX_TARGET
namespace amx {
extern const AttentionKernels kBfloat16Attention;
}
#endif

// The kernels of one of attention_instruction_sets(). Throws std::invalid_argument for any other
// name.
const AttentionKernels& attention_kernels(const std::string& instruction_set, bool bfloat16);

}  // namespace bclip::cpu
