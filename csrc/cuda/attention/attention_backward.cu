// A block of warps computes a sequence and head. It holds K and V of up to kKeys keys in shared
// memory. In registers, each warp holds the sums of dK and dV for 16 or 32 of these keys. The block
// goes through strips of 64 queries. It computes S^T and (dO V^T)^T, so that P^T and dS^T are left
// operands of dV and dK without any exchange. Then dS^T goes through shared memory, from which the
// warps compute parts of dQ = dS K. That is five products without atomics, while one kernel for dQ
// and one for dK and dV would need seven. For a longer sequence, the block goes through chunks of
// keys and accumulates dQ in `workspace`.
#include "csrc/cuda/attention/attention.cuh"

#include <stdexcept>

namespace bclip::cuda {
namespace {

constexpr int kStrip = 64;

struct Arguments {
  Attention attention;
  AttentionGradient gradient;
};

template <class T, int kDim, int kWarps>
struct Layout {
  static constexpr int kColumns = kDim, kKeysPerWarp = kDim <= 64 ? 32 : 16,
                       kKeys = kWarps * kKeysPerWarp;
  static constexpr int kRows = Tile<T, kDim>::bytes(kStrip);
  static constexpr int kKey = 0, kValue = Tile<T, kDim>::bytes(kKeys), kQuery = 2 * kValue;
  // Q and dO have two buffers each, because the next strip is copied during the work on this one.
  static constexpr int kGrad = kQuery + 2 * kRows;
  static constexpr int kScoresGrad = kGrad + 2 * kRows,
                       kDelta = kScoresGrad + Tile<T, kStrip>::bytes(kKeys);
  static constexpr int kLse = kDelta + kStrip * 4, kVisible = kLse + kStrip * 4,
                       kBytes = kVisible + kKeys * 4;
};

template <class T, int kDim, int kWarps, bool kDropout>
__global__ void __launch_bounds__(kWarps * 32, 1) backward(Arguments arguments) {
  using Places = Layout<T, kDim, kWarps>;
  constexpr int kKeys = Places::kKeys, kWarpKeys = Places::kKeysPerWarp, kThreads = kWarps * 32;
  // Each warp computes a block of 16 rows and kPartColumns columns of the dQ of a strip.
  constexpr int kPartColumns = kDim / (kWarps / 4);
  const Attention& attention = arguments.attention;
  const AttentionGradient& gradient = arguments.gradient;
  const int heads = attention.heads, head = block_index() % heads;
  const Sequence sequence = sequence_of(attention, block_index() / heads);
  const int length = sequence.length;

  const int warp = warp_index(), lane = lane_index(), group = lane / 4, place = lane % 4;
  const Tile<T, kDim> keys{{Places::kKey}}, values{{Places::kValue}};
  const Tile<T, kStrip> scores_grads{{Places::kScoresGrad}};  // (key, query)
  const Shared<float> deltas{Places::kDelta}, row_lse{Places::kLse}, visible{Places::kVisible};
  const int64_t stride = attention.token_stride, grad_stride = gradient.out_grad_token_stride;
  const int64_t out_stride = int64_t(heads) * kDim;
  const T* const query_rows =
      static_cast<const T*>(attention.qkv) + sequence.start * stride + head * attention.head_stride;
  const T* const key_rows = query_rows + attention.part_stride;
  const T* const grad_rows = static_cast<const T*>(gradient.out_grad) +
                             sequence.start * grad_stride + head * gradient.out_grad_head_stride;
  const T* const out_rows =
      static_cast<const T*>(gradient.out) + sequence.start * out_stride + head * kDim;
  // These addresses are computed at each use, because no registers are left to keep them.
  const auto qkv_grad = [&](int row) {
    return static_cast<T*>(gradient.qkv_grad) + (sequence.start + row) * 3 * out_stride +
           head * kDim;
  };
  const auto lse = [&](int row) {
    return load_global(&gradient.lse[head * attention.rows + sequence.start + row]);
  };
  const float factor = attention.scale * kLog2E,
              keep_scale = kDropout ? attention.keep_scale : 1.0f;

  const auto copy_strip = [&](int first, int stage) {
    if (first < length) {
      const int count = min(kStrip, length - first);
      const Tile<T, kDim> queries{{Places::kQuery + stage * Places::kRows}},
          grads{{Places::kGrad + stage * Places::kRows}};
      queries.copy_rows(query_rows + first * stride, stride, kStrip, count, thread_index(),
                        kThreads);
      grads.copy_rows(grad_rows + first * grad_stride, grad_stride, kStrip, count, thread_index(),
                      kThreads);
    }
    commit_copies();
  };

  for (int chunk = 0; chunk < length; chunk += kKeys) {
    const int chunk_keys = min(kKeys, length - chunk), rounded = (chunk_keys + 15) / 16 * 16;
    block_barrier();
    keys.copy_rows(key_rows + chunk * stride, stride, rounded, chunk_keys, thread_index(),
                   kThreads);
    values.copy_rows(key_rows + attention.part_stride + chunk * stride, stride, rounded, chunk_keys,
                     thread_index(), kThreads);
    store_visible(visible, attention, sequence, chunk, kKeys, kThreads);
    float key_grad[kWarpKeys / 16][kDim / 8][4] = {}, value_grad[kWarpKeys / 16][kDim / 8][4] = {};
    // With a causal mask, queries before the chunk see none of its keys.
    const int first_strip = attention.causal ? chunk / kStrip * kStrip : 0;
    int stage = 0;
    copy_strip(first_strip, 0);
    for (int first = first_strip; first < length; first += kStrip, stage ^= 1) {
      copy_strip(first + kStrip, stage ^ 1);
      wait_for_copies<1>();
      block_barrier();
      const Tile<T, kDim> queries{{Places::kQuery + stage * Places::kRows}},
          grads{{Places::kGrad + stage * Places::kRows}};
      // Four lanes share a row.
      for (int index = thread_index(); index < kStrip * 4; index += kThreads) {
        const int row = index / 4;
        float delta = 0.0f;
        if (first + row < length) {
#pragma unroll
          for (int part = 0; part < kDim / 32; ++part) {
            // Two rows share a wave of 128 bytes, and even rows read its other half.
            const int half = grads.kOdd ? part : part ^ (row & 1);
            const int column = half * 32 + index % 4 * 8;
            const Quad grad = grads.memory.template load_as<Quad>(grads.index(row, column));
            const Quad out = load_global(
                reinterpret_cast<const Quad*>(out_rows + (first + row) * out_stride + column));
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
          const float value = first + row < length ? lse(first + row) * kLog2E : 0.0f;
          deltas.store(row, delta);
          // A query that sees no key has zero weights for any finite value.
          row_lse.store(row, value == -infinity() ? 0.0f : value);
        }
      }
      block_barrier();

#pragma unroll 1
      for (int strip = 0; strip < kStrip; strip += 16) {
        if (first + strip >= length || chunk + warp * kWarpKeys >= length) break;
        float scores[kWarpKeys / 16][2][4] = {}, weights_grad[kWarpKeys / 16][2][4] = {};
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
          uint32_t query[4], grad[4];
          queries.load_right_columns(query, strip, k * 16);
          grads.load_right_columns(grad, strip, k * 16);
#pragma unroll
          for (int tile = 0; tile < kWarpKeys / 16; ++tile) {
            const int row = warp * kWarpKeys + tile * 16;
            if (chunk + row >= length) continue;
            uint32_t key[4], value[4];
            keys.load_left(key, row, k * 16);
            values.load_left(value, row, k * 16);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              multiply<T>(scores[tile][half], key, query[2 * half], query[2 * half + 1]);
              multiply<T>(weights_grad[tile][half], value, grad[2 * half], grad[2 * half + 1]);
            }
          }
        }
#pragma unroll
        for (int tile = 0; tile < kWarpKeys / 16; ++tile) {
          const int row = warp * kWarpKeys + tile * 16;
          if (chunk + row >= length) continue;
          const float shown[2] = {visible.load(row + group), visible.load(row + group + 8)};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int column = strip + half * 8 + place * 2;
            const Pair delta = deltas.load_as<Pair>(column), high = row_lse.load_as<Pair>(column);
            // One bit for each element of (row, row + 8) x (column, column + 1), in the fragment's
            // order.
            uint32_t kept = 0xf;
            if (kDropout) {
              // Lane 8 q + i draws for quad q of the 16 keys and query i of the 8.
              const uint32_t query =
                  static_cast<uint32_t>(sequence.start) + first + strip + half * 8 + lane % 8;
              const uint32_t drawn = kept_of_quad(load_global(attention.seed), attention.threshold,
                                                  (chunk + row) / 4 + lane / 8, query, head);
              const int source = group / 4 * 8 + place * 2;
              kept = 0;
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                kept |= (shuffle(drawn, source + i % 2 + i / 2 * 16) >> group % 4 & 1) << i;
              }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float &score = scores[tile][half][i], &weight_grad = weights_grad[tile][half][i];
              const bool late =
                  attention.causal && chunk + row + group + i / 2 * 8 > first + column + i % 2;
              const bool seen = shown[i / 2] != 0.0f && !late, keeps = kept >> i & 1;
              const float weight =
                  seen ? exp2_fast(score * factor - (i % 2 ? high.high : high.low)) : 0.0f;
              const float through = keeps ? weight_grad * keep_scale : 0.0f;
              score = keeps ? weight : 0.0f;
              weight_grad = seen ? weight * (through - (i % 2 ? delta.high : delta.low)) : 0.0f;
              rejoin_lanes();
            }
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
              scores_grads.memory.template store_as<uint32_t>(
                  scores_grads.index_of_pair(row + group + i / 2 * 8, column),
                  pack<T>(weights_grad[tile][half][i], weights_grad[tile][half][i + 1]));
            }
          }
          uint32_t weights[4], weights_grads[4];
          pack_left<T>(weights, scores[tile][0], scores[tile][1]);
          pack_left<T>(weights_grads, weights_grad[tile][0], weights_grad[tile][1]);
#pragma unroll
          for (int column = 0; column < kDim / 16; ++column) {
            uint32_t grad[4], query[4];
            grads.load_right_rows(grad, strip, column * 16);
            queries.load_right_rows(query, strip, column * 16);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              multiply<T>(value_grad[tile][2 * column + half], weights, grad[2 * half],
                          grad[2 * half + 1]);
              multiply<T>(key_grad[tile][2 * column + half], weights_grads, query[2 * half],
                          query[2 * half + 1]);
            }
          }
        }
      }
      block_barrier();

      const int strip = warp % 4 * 16, part = warp / 4 * kPartColumns;
      if (first + strip >= length) continue;
      float sum[kPartColumns / 8][4] = {};
#pragma unroll 2
      for (int row = 0; row < rounded; row += 16) {
        uint32_t left[4];
        scores_grads.load_left_transposed(left, row, strip);
#pragma unroll
        for (int column = 0; column < kPartColumns / 16; ++column) {
          uint32_t right[4];
          keys.load_right_rows(right, row, part + column * 16);
          multiply<T>(sum[2 * column], left, right[0], right[1]);
          multiply<T>(sum[2 * column + 1], left, right[2], right[3]);
        }
      }
      const int last_key = attention.causal ? min(length, first + kStrip) : length;
      const bool begins = chunk == 0, ends = chunk + kKeys >= last_key;
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = first + strip + group + i / 2 * 8;
        if (row >= length) continue;
        T* const to = qkv_grad(row) + part + place * 2;
        float* const added = begins && ends
                                 ? nullptr
                                 : gradient.workspace + (sequence.start + row) * out_stride +
                                       head * kDim + part + place * 2;
#pragma unroll
        for (int column = 0; column < kPartColumns / 8; ++column) {
          Pair value{sum[column][i], sum[column][i + 1]};
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
    }
    // No copy is in flight, since the copy group of a strip after the end is empty. K and V are no
    // longer in use, so each warp writes its gradients over its own rows of them.
    wait_for_copies<0>();
    block_barrier();
    const int row = warp * kWarpKeys, count = min(kWarpKeys, length - chunk - row);
    if (count <= 0) continue;
#pragma unroll
    for (int tile = 0; tile < kWarpKeys / 16; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int key_row = row + tile * 16 + group + i / 2 * 8;
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
    T* const to = qkv_grad(chunk + row) + out_stride;
    const Tile<T, kDim> own_keys{{Places::kKey + Tile<T, kDim>::bytes(row)}};
    const Tile<T, kDim> own_values{{Places::kValue + Tile<T, kDim>::bytes(row)}};
    own_keys.store_rows(to, 3 * out_stride, count, lane, 32);
    own_values.store_rows(to + out_stride, 3 * out_stride, count, lane, 32);
  }
}

// Returns act(layout for these sizes). 256 keys of 64 elements need 129.5 KiB. If a block may use
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
    constexpr int kWarps = Chosen::kKeys / Chosen::kKeysPerWarp;
    launch(attention.seed ? backward<T, Chosen::kColumns, kWarps, true>
                          : backward<T, Chosen::kColumns, kWarps, false>,
           {attention.sequences * attention.heads, kWarps * 32, Chosen::kBytes, attention.stream},
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
