// What attention.cpp runs on one head of one sequence, compiled once per instruction set.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/attention.h"
#include "csrc/single_query_attention.h"

namespace bclip::cpu {

struct Head {
  const void *query, *key, *value;  // (rows, dim), rows `stride` elements apart
  int64_t stride, rows, dim;
  const uint8_t* key_mask;  // (rows,) or null
  bool causal;
  float scale;
  bool dropout;
  uint32_t threshold;  // floor(p * 2^32)
  float kept;          // 1 / (1 - p)
  uint32_t seed[2];
  uint32_t head, first_row;  // of the sequence, for the random words
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
  const char* name;
  int64_t (*forward_bytes)(const Head&);  // of scratch, on a boundary of 64 bytes
  void (*forward)(const Head&, const HeadOutput&, char* scratch);
  int64_t (*backward_bytes)(const Head&);
  void (*backward)(const Head&, const HeadGradient&, char* scratch);
  // Of a whole sequence of so many rows, all heads.
  int64_t (*pooled_bytes)(const PooledAttention&, int64_t rows);
  void (*pooled_forward)(const PooledAttention&, int64_t sequence, void* out, float* lse, float* scratch);
  void (*pooled_backward)(const PooledAttention&, const PooledAttentionGradient&, int64_t sequence, float* scratch);
};

// Throws std::invalid_argument where this machine hasn't got them.
const AttentionKernels& attention_kernels(const std::string& instruction_set, bool bfloat16);

// At least so many bytes, aligned to 64, of this thread's own.
char* attention_scratch(int64_t bytes);

// [0] for float, [1] for bfloat16.
extern const AttentionKernels kPlainAttention[2];
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BCLIP_X86_TARGETS 1
extern const AttentionKernels kAvx2Attention[2], kAvx512Attention[2];
#ifdef __linux__
extern const AttentionKernels kAmxAttention;  // for bfloat16
#endif
#endif

}  // namespace bclip::cpu
