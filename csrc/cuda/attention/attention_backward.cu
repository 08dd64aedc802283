// A block of warps computes a sequence and head. It holds K and V of up to kKeys keys in shared
// memory. In registers, each warp holds the sums of dK and dV for 16 or 32 of these keys. The block
// goes through strips of kStrip queries. It computes S^T and (dO V^T)^T, so that P^T and dS^T are
// left operands of dV and dK without any exchange. Then dS^T goes through shared memory, from which
// the warps compute parts of dQ = dS K. That is five products without atomics, while one kernel for
// dQ and one for dK and dV would need seven. For a longer sequence, the block goes through chunks
// of keys and accumulates dQ in `workspace`.
//
// 8 warps of 255 registers are the only block of a multiprocessor. The sums of dK and dV for 197
// keys of 64 elements take 104 KiB of its 256 KiB of registers, so those of two blocks leave too
// few. Blocks of 128 keys would fit twice, but would accumulate dQ in global memory.
#include "csrc/cuda/attention/attention_backward.cuh"

#include <stdexcept>
#include <type_traits>

namespace bclip::cuda {
namespace {

template <int kNumber>
using Number = std::integral_constant<int, kNumber>;

struct Arguments {
  Attention attention;
  AttentionGradient gradient;
};

template <class T, int kDim, int kWarps, bool kDropout>
__global__ void __launch_bounds__(kWarps * 32, Layout<T, kDim, kWarps>::kBlocks)
    backward(Arguments arguments) {
  using Places = Layout<T, kDim, kWarps>;
  constexpr int kKeys = Places::kKeys, kThreads = Places::kThreads, kStrip = Places::kStrip,
                kKeyTiles = Places::kKeyTiles;
  // Tiles of 16 queries that a warp takes at once. Dropout needs the registers of the second one.
  constexpr int kQueryTiles = kDropout ? 1 : 2;
  const Attention& attention = arguments.attention;
  const AttentionGradient& gradient = arguments.gradient;
  const int heads = attention.heads, head = block_index() % heads;
  const Sequence sequence = sequence_of(attention, block_index() / heads);
  const int length = sequence.length;

  const int warp = warp_index(), lane = lane_index(), group = lane / 4, place = lane % 4;
  const Tile<T, kDim> keys{{Places::kKey}}, values{{Places::kValue}}, queries{{Places::kQuery}},
      grads{{Places::kGrad}};
  const Shared<float> deltas{Places::kDelta}, row_lse{Places::kLse}, visible{Places::kVisible};
  const int64_t out_stride = int64_t(heads) * kDim;
  // These addresses are computed at each use, because no registers are left to keep them.
  const auto qkv_rows = [&](int part, int row) {
    return static_cast<const T*>(attention.qkv) + (sequence.start + row) * attention.token_stride +
           part * attention.part_stride + head * attention.head_stride;
  };
  const auto grad_rows = [&](int row) {
    return static_cast<const T*>(gradient.out_grad) +
           (sequence.start + row) * gradient.out_grad_token_stride +
           head * gradient.out_grad_head_stride;
  };
  const auto qkv_grad = [&](int row) {
    return static_cast<T*>(gradient.qkv_grad) + (sequence.start + row) * 3 * out_stride +
           head * kDim;
  };

  // Starts the copies of a strip's Q and dO, and computes delta (the row sums of dO * out) while
  // they are in flight.
  const auto fetch_strip = [&](int first) {
    const int count = min(kStrip, length - first), rounded = (count + 15) / 16 * 16;
    queries.copy_rows(qkv_rows(0, first), attention.token_stride, rounded, count, thread_index(),
                      kThreads);
    grads.copy_rows(grad_rows(first), gradient.out_grad_token_stride, rounded, count,
                    thread_index(), kThreads);
    commit_copies();
    // Four lanes share a row.
    for (int index = thread_index(); index < kStrip * 4; index += kThreads) {
      const int row = index / 4;
      float delta = 0.0f;
      if (row < count) {
#pragma unroll
        for (int part = 0; part < kDim / 32; ++part) {
          const int column = part * 32 + index % 4 * 8;
          const Quad grad =
              load_global(reinterpret_cast<const Quad*>(grad_rows(first + row) + column));
          const Quad out = load_global(reinterpret_cast<const Quad*>(
              static_cast<const T*>(gradient.out) + (sequence.start + first + row) * out_stride +
              head * kDim + column));
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            const Pair one = unpack<T>(grad.words[word]), other = unpack<T>(out.words[word]);
            delta += one.low * other.low + one.high * other.high;
          }
        }
      }
      delta += shuffle_xor(delta, 1);
      delta += shuffle_xor(delta, 2);
      if (index % 4 == 0) {
        const float lse =
            row < count
                ? load_global(&gradient.lse[head * attention.rows + sequence.start + first + row]) *
                      kLog2E
                : 0.0f;
        deltas.store(row, delta);
        // A query that sees no key has zero weights for any finite value.
        row_lse.store(row, lse == -infinity() ? 0.0f : lse);
      }
    }
  };

  for (int chunk = 0; chunk < length; chunk += kKeys) {
    const int chunk_keys = min(kKeys, length - chunk), rounded = (chunk_keys + 15) / 16 * 16;
    if (chunk > 0) block_barrier();
    keys.copy_rows(qkv_rows(1, chunk), attention.token_stride, rounded, chunk_keys, thread_index(),
                   kThreads);
    values.copy_rows(qkv_rows(2, chunk), attention.token_stride, rounded, chunk_keys,
                     thread_index(), kThreads);
    store_visible(visible, attention, sequence, chunk, kKeys, kThreads);
    Sums<Places> key_grad = {}, value_grad = {};
    const int warp_row = warp * Places::kKeysPerWarp, warp_keys = chunk_keys - warp_row;
    // With a causal mask, queries before the chunk see none of its keys.
    const int first_strip = attention.causal ? chunk / kStrip * kStrip : 0;
    fetch_strip(first_strip);
    for (int first = first_strip; first < length; first += kStrip) {
      const int count = min(kStrip, length - first);
      wait_for_copies<0>();
      block_barrier();
      const auto add = [&](auto key_tiles, auto query_tiles, int strip) {
        const Place at{warp_row, chunk + warp_row, strip, first + strip, head, sequence};
        add_key_value_grads<T, Places, decltype(key_tiles)::value, decltype(query_tiles)::value,
                            kDropout>(key_grad, value_grad, attention, at);
      };
      int strip = 0;
      if (warp_keys > 16 * (kKeyTiles - 1)) {
#pragma unroll 1
        for (; strip + 16 * (kQueryTiles - 1) < count; strip += 16 * kQueryTiles) {
          add(Number<kKeyTiles>(), Number<kQueryTiles>(), strip);
        }
        if (kQueryTiles > 1 && strip < count) add(Number<kKeyTiles>(), Number<1>(), strip);
      } else if (warp_keys > 0) {
#pragma unroll 1
        for (; strip < count; strip += 16) add(Number<1>(), Number<1>(), strip);
      }
      block_barrier();
      // Q and dO are no longer in use.
      if (first + kStrip < length) fetch_strip(first + kStrip);

      const int last_key = attention.causal ? min(length, first + kStrip) : length;
      const bool begins = chunk == 0, ends = chunk + kKeys >= last_key;
      const int part_row = warp % Places::kParts * Places::kPartRows,
                part = warp / Places::kParts * Places::kPartColumns;
      const auto part_of_query_grad = [&](auto tiles) {
        constexpr int kTiles = decltype(tiles)::value;
        float sums[kTiles][Places::kPartColumns / 8][4] = {};
        query_grads<T, Places>(sums, chunk_keys, part_row, part);
#pragma unroll
        for (int half = 0; half < 2 * kTiles; ++half) {
          const int row = first + part_row + group + half * 8;
          if (row >= length) continue;
          T* const to = qkv_grad(row) + part + place * 2;
          float* const added = begins && ends
                                   ? nullptr
                                   : gradient.workspace + (sequence.start + row) * out_stride +
                                         head * kDim + part + place * 2;
#pragma unroll
          for (int column = 0; column < Places::kPartColumns / 8; ++column) {
            const float* const sum = sums[half / 2][column] + half % 2 * 2;
            Pair value{sum[0], sum[1]};
            if (!begins) {
              const Pair before = load_global(reinterpret_cast<const Pair*>(added + column * 8));
              value = {value.low + before.low, value.high + before.high};
            }
            if (ends) {
              store_global(reinterpret_cast<uint32_t*>(to + column * 8),
                           pack<T>(value.low * attention.scale, value.high * attention.scale));
            } else {
              store_global(reinterpret_cast<Pair*>(added + column * 8), value);
            }
          }
        }
      };
      if (Places::kPartRows == 32 && part_row + 16 < count) {
        part_of_query_grad(Number<Places::kPartRows / 16>());
      } else if (part_row < count) {
        part_of_query_grad(Number<1>());
      }
    }
    // K and V are no longer in use, so each warp writes its gradients over its own rows of them.
    block_barrier();
    const int num_rows = min(Places::kKeysPerWarp, warp_keys);
    if (num_rows <= 0) continue;
    const float keep_scale = kDropout ? attention.keep_scale : 1.0f;
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int key_row = warp_row + tile * 16 + group + i / 2 * 8;
#pragma unroll
        for (int column = 0; column < kDim / 8; ++column) {
          const int index = keys.index_of_pair(key_row, column * 8 + place * 2);
          const float (&key)[4] = key_grad[tile][column];
          const float (&value)[4] = value_grad[tile][column];
          keys.memory.template store_as<uint32_t>(
              index, pack<T>(key[i] * attention.scale, key[i + 1] * attention.scale));
          values.memory.template store_as<uint32_t>(
              index, pack<T>(value[i] * keep_scale, value[i + 1] * keep_scale));
        }
      }
    }
    warp_barrier();
    T* const to = qkv_grad(chunk + warp_row) + out_stride;
    const Tile<T, kDim> own_keys{{Places::kKey + Tile<T, kDim>::bytes(warp_row)}};
    const Tile<T, kDim> own_values{{Places::kValue + Tile<T, kDim>::bytes(warp_row)}};
    own_keys.store_rows(to, 3 * out_stride, num_rows, lane, 32);
    own_values.store_rows(to + out_stride, 3 * out_stride, num_rows, lane, 32);
  }
}

// Returns act(layout for these sizes). 256 keys of 64 elements need 162 KiB. If a block may use
// less (99 KiB on sm_86, sm_89 and sm_120), it processes the keys in chunks of 128.
template <class T, class Act>
auto with_layout(int dim, int max_length, int block_bytes, Act&& act) {
  switch (dim) {
    case 32:
      return act(Layout<T, 32, 8>());
    case 64:
      return max_length <= 128 || block_bytes < Layout<T, 64, 8>::kBytes ? act(Layout<T, 64, 4>())
                                                                         : act(Layout<T, 64, 8>());
    case 96:
      return act(Layout<T, 96, 8>());
    case 128:
      return act(Layout<T, 128, 8>());
    default:
      throw std::invalid_argument("the head dimension isn't among 32, 64, 96 and 128");
  }
}

template <class T>
void run(const Arguments& arguments) {
  const Attention& attention = arguments.attention;
  with_layout<T>(attention.dim, attention.max_length, attention.block_bytes, [&](auto layout) {
    using Chosen = decltype(layout);
    constexpr int kWarps = Chosen::kThreads / 32;
    launch(
        attention.seed ? backward<T, Chosen::kColumns, kWarps, true>
                       : backward<T, Chosen::kColumns, kWarps, false>,
        {attention.sequences * attention.heads, Chosen::kThreads, Chosen::kBytes, attention.stream},
        arguments);
  });
}

}  // namespace

void attention_backward(const Attention& attention, const AttentionGradient& gradient) {
  const int keys =
      attention_backward_keys(attention.dim, attention.max_length, attention.block_bytes);
  if (attention.max_length > keys && !gradient.workspace) {
    throw std::invalid_argument("rows this long need a workspace");
  }
  const Arguments arguments{attention, gradient};
  attention.bfloat16 ? run<Bfloat16>(arguments) : run<Half>(arguments);
}

int attention_backward_keys(int dim, int max_length, int block_bytes) {
  return with_layout<Half>(dim, max_length, block_bytes,
                           [](auto layout) { return decltype(layout)::kKeys; });
}

int attention_backward_shared_bytes(int dim, int max_length, int block_bytes) {
  return with_layout<Half>(dim, max_length, block_bytes,
                           [](auto layout) { return decltype(layout)::kBytes; });
}

}  // namespace bclip::cuda
