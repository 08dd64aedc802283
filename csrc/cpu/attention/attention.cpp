#include "csrc/attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/cpu/attention/attention_kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd/isa.h"
#include "csrc/cpu/simd/scratch.h"

namespace bclip::cpu {

namespace {

// The name of the matrix unit among instruction sets.
constexpr const char* kAmxName = "amx";

void check(const Attention& attention) {
  if (attention.rows < 0 || attention.heads < 0 || attention.dim <= 0 || attention.sequences < 0)
    throw std::invalid_argument("attention: a size is negative");
  if (attention.dim % 16)
    throw std::invalid_argument("attention: the head dimension isn't a multiple of 16");
  if (attention.bounds[0] != 0 || attention.bounds[attention.sequences] != attention.rows)
    throw std::invalid_argument("attention: the bounds don't run from 0 to T");
  for (int64_t i = 0; i < attention.sequences; ++i)
    if (attention.bounds[i + 1] < attention.bounds[i])
      throw std::invalid_argument("attention: the bounds of sequences don't rise");
}

// Calls run(head, start) for each head of each sequence, where `start` is the first row of the
// sequence.
template <class Run>
void for_heads(const Attention& attention, int threads, const Run& run) {
  check(attention);
  const int64_t row_bytes = attention.dim * (attention.bfloat16 ? 2 : 4),
                part = attention.heads * row_bytes;
  parallel(attention.sequences * attention.heads, threads, [&](int64_t index) {
    const int64_t sequence = index / attention.heads, number = index % attention.heads;
    const int64_t start = attention.bounds[sequence], rows = attention.bounds[sequence + 1] - start;
    if (rows == 0) return;
    const char* query =
        static_cast<const char*>(attention.qkv) + start * 3 * part + number * row_bytes;
    Head head = {};
    head.query = query;
    head.key = query + part;
    head.value = query + 2 * part;
    head.stride = 3 * attention.heads * attention.dim;
    head.rows = rows;
    head.dim = attention.dim;
    head.key_mask = attention.key_mask ? attention.key_mask + start : nullptr;
    head.causal = attention.causal;
    head.scale = static_cast<float>(attention.scale);
    head.dropout = attention.dropout_p > 0;
    head.threshold = static_cast<uint32_t>(attention.dropout_p * 4294967296.0);
    head.kept = static_cast<float>(1 / (1 - attention.dropout_p));
    head.seed[0] = static_cast<uint32_t>(attention.seed);
    head.seed[1] = static_cast<uint32_t>(attention.seed >> 32);
    head.head = static_cast<uint32_t>(number);
    head.first_row = static_cast<uint32_t>(start);
    run(head, start);
  });
}

}  // namespace

const AttentionKernels& attention_kernels(const std::string& instruction_set, bool bfloat16) {
  const std::vector<std::string> names = attention_instruction_sets(bfloat16);
  if (std::find(names.begin(), names.end(), instruction_set) == names.end())
    throw std::invalid_argument("attention: this machine has no " + instruction_set);
#ifdef BCLIP_AMX_TARGET
  if (instruction_set == kAmxName) return amx::kBfloat16Attention;
#endif
  Isa isa = Isa::kPortable;
  for (const Isa other : {Isa::kAvx2, Isa::kAvx512})
    if (instruction_set == name_of(other)) isa = other;
  return bfloat16 ? bfloat16_attention(isa) : float_attention(isa);
}

std::vector<std::string> attention_instruction_sets(bool bfloat16) {
  std::vector<std::string> names;
  if (bfloat16 && has_amx()) names.emplace_back(kAmxName);
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kPortable})
    if (isa <= isa_in_use()) names.emplace_back(name_of(isa));
  return names;
}

void attention_forward(const Attention& attention, void* out, float* lse, int threads) {
  const AttentionKernels& chosen = attention_kernels(attention.instruction_set, attention.bfloat16);
  const int64_t stride = attention.heads * attention.dim, element = attention.bfloat16 ? 2 : 4;
  for_heads(attention, threads, [&](const Head& head, int64_t start) {
    const int64_t at = (start * attention.heads + head.head) * attention.dim * element;
    chosen.forward(head,
                   {static_cast<char*>(out) + at, stride, lse + head.head * attention.rows + start},
                   thread_scratch(chosen.forward_bytes(head)));
  });
}

void attention_backward(const Attention& attention, const AttentionGradient& gradient,
                        int threads) {
  const AttentionKernels& chosen = attention_kernels(attention.instruction_set, attention.bfloat16);
  const int64_t stride = attention.heads * attention.dim, element = attention.bfloat16 ? 2 : 4;
  for_heads(attention, threads, [&](const Head& head, int64_t start) {
    const int64_t at = (start * attention.heads + head.head) * attention.dim * element;
    const int64_t query_at = (start * 3 * attention.heads + head.head) * attention.dim * element;
    char* query = static_cast<char*>(gradient.qkv_grad) + query_at;
    chosen.backward(head,
                    {static_cast<const char*>(gradient.out_grad) + at,
                     static_cast<const char*>(gradient.out) + at, stride,
                     gradient.lse + head.head * attention.rows + start, query,
                     query + stride * element, query + 2 * stride * element, 3 * stride},
                    thread_scratch(chosen.backward_bytes(head)));
  });
}

}  // namespace bclip::cpu
