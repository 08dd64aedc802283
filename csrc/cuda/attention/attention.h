// Attention inside sequences that lie one after another; the maths and the dropout are those of csrc/attention.h and of
// bclip_fast/ops/attention/reference.py. Throws std::invalid_argument for a head dimension that isn't built and
// std::runtime_error with CUDA's reason. All addresses are the device's and, with all strides, multiples of 16 bytes.
#pragma once

#include <cstdint>

namespace bclip::cuda {

struct Attention {
  const void* qkv;  // (T, 3, H, d), the d elements side by side
  bool bfloat16;    // else float16
  int64_t token_stride, part_stride, head_stride;  // in elements
  int64_t rows, sequences;                         // T, n
  int heads, dim;                                  // H, d
  const int32_t* bounds;    // (n + 1,), rising from 0 to T; null where every sequence has max_length rows
  int max_length;
  const uint8_t* key_mask;  // (T,), 0 where no query may attend to the key; or null
  bool causal;
  float scale;
  const int64_t* seed;  // (); null without dropout
  uint32_t threshold;   // floor(p 2^32)
  float keep_scale;     // 1 / (1 - p)
  int block_bytes;      // of shared memory that the device gives a block of threads
  void* stream;
};

// Writes out (T, H, d) and lse (H, T), contiguous. A sequence and head's blocks of queries are shared out to `splits`
// blocks of threads.
void attention_forward(const Attention& attention, void* out, float* lse, int splits);

struct AttentionGradient {
  const void *out_grad, *out;  // (T, H, d)
  int64_t out_grad_token_stride, out_grad_head_stride;
  const float* lse;  // (H, T)
  void* qkv_grad;    // (T, 3, H, d), written
  float* workspace;  // (T, H, d) where attention_backward_keys is less than max_length
};

void attention_backward(const Attention& attention, const AttentionGradient& gradient);

// How many keys a block of threads holds at once: longer rows add up their dQ in the workspace.
int attention_backward_keys(int dim, int max_length, int block_bytes);

// What a block takes of a multiprocessor's shared memory.
int attention_forward_shared_bytes(int dim, int max_length);
int attention_backward_shared_bytes(int dim, int max_length, int block_bytes);

}  // namespace bclip::cuda
