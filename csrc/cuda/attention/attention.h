// Attention within each sequence of a packed batch: csrc/attention.h defines the maths and the
// dropout. Throws std::invalid_argument for a head dimension that isn't built, and
// std::runtime_error with CUDA's reason. All addresses are the device's. Addresses and strides are
// multiples of 16 bytes.
#pragma once

#include <cstdint>

namespace bclip::cuda {

struct Attention {
  const void* qkv;                                 // (T, 3, H, d), whose d elements are contiguous
  bool bfloat16;                                   // else float16
  int64_t token_stride, part_stride, head_stride;  // in elements
  int64_t rows, sequences;                         // T, n
  int heads, dim;                                  // H, d
  // (n + 1,), rising from 0 to T, or null if every sequence has max_length rows.
  const int32_t* bounds;
  int max_length;
  const uint8_t* key_mask;  // (T,), 0 for a key that no query may attend to; or null
  bool causal;
  float scale;
  const int64_t* seed;  // (); null without dropout
  uint32_t threshold;   // floor(p 2^32)
  float keep_scale;     // 1 / (1 - p)
  int block_bytes;      // shared memory that the device gives a block of threads
  void* stream;
};

// Writes out (T, H, d) and lse (H, T), contiguous. `splits` blocks of threads share the queries of
// a sequence and head.
void attention_forward(const Attention& attention, void* out, float* lse, int splits);

struct AttentionGradient {
  const void *out_grad, *out;  // (T, H, d)
  int64_t out_grad_token_stride, out_grad_head_stride;
  const float* lse;  // (H, T)
  void* qkv_grad;    // (T, 3, H, d), written
  float* workspace;  // (T, H, d) if attention_backward_keys() is less than max_length, else null
};

void attention_backward(const Attention& attention, const AttentionGradient& gradient);

// The number of keys that a block of threads holds at once. Longer sequences accumulate dQ in the
// workspace.
int attention_backward_keys(int dim, int max_length, int block_bytes);

// Shared memory of a block of threads, in bytes.
int attention_forward_shared_bytes(int dim, int max_length);
int attention_backward_shared_bytes(int dim, int max_length, int block_bytes);

}  // namespace bclip::cuda
