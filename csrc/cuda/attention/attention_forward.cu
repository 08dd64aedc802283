// A block of 4 warps computes every splits-th strip of 64 queries of a sequence and head. A warp
// holds the scores of its 16 queries with up to kKeys keys in registers. For a sequence of at most
// kKeys rows, K and V are loaded once and the softmax needs one pass. The warps then don't wait for
// each other. Longer sequences go through chunks of kKeys keys with a running maximum (Milakov and
// Gimelshein 2018, arXiv 1805.02867). Keys after the end of the sequence cost nothing beyond the
// next multiple of 16.
#include "csrc/cuda/attention/attention.cuh"

#include <stdexcept>

namespace bclip::cuda {
namespace {

constexpr int kWarps = 4, kStrip = 16 * kWarps;

struct Arguments {
  Attention attention;
  void* out;
  float* lse;
  int splits;
};

template <class T, int kDim, int kKeys>
struct Layout {
  static constexpr int kColumns = kDim, kRows = kKeys;
  static constexpr int kKey = 0, kValue = Tile<T, kDim>::bytes(kKeys), kQuery = 2 * kValue;
  static constexpr int kVisible = kQuery + Tile<T, kDim>::bytes(kStrip),
                       kBytes = kVisible + kKeys * 4;
};

// Exchanges 4 x 4 words among the lanes of a group of 4: word i of lane j goes to word j of lane i.
__device__ __forceinline__ void transpose_words(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane_index() & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      uint32_t &low = words[i], &high = words[i | bit];
      const uint32_t other = shuffle_xor(upper ? low : high, bit);
      (upper ? low : high) = other;
    }
  }
}

template <class T, int kDim, int kKeys, bool kDropout>
__global__ void __launch_bounds__(kWarps * 32, kKeys == 128 && kDim == 64 && !kDropout ? 3 : 2)
    forward(Arguments arguments) {
  using Places = Layout<T, kDim, kKeys>;
  using Rows = Tile<T, kDim>;
  const Attention& attention = arguments.attention;
  const int splits = arguments.splits, heads = attention.heads;
  const int block = static_cast<int>(block_index());
  const int split = block % splits, head = block / splits % heads;
  const Sequence sequence = sequence_of(attention, block / splits / heads);
  const int length = sequence.length;
  if (split * kStrip >= length) return;

  const int lane = lane_index(), group = lane / 4, place = lane % 4;
  // The last strip leaves warps without queries. In the blocks that share a multiprocessor, these
  // are different warps, so that no sub-core gets more work than the others.
  const int warp = (uint32_t(warp_index()) + block + block / kWarps) % kWarps;
  const Rows keys{{Places::kKey}}, values{{Places::kValue}};
  const Rows queries{{Places::kQuery + warp * Rows::bytes(16)}};
  const Shared<float> visible{Places::kVisible};
  // This lane's rows of the fragments of 16 keys and 16 columns.
  const int key_place = Rows::index(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8),
            value_place = Rows::index(lane % 16, lane / 16 * 8);
  const T* const query_rows = static_cast<const T*>(attention.qkv) +
                              sequence.start * attention.token_stride +
                              head * attention.head_stride;
  const T* const key_rows = query_rows + attention.part_stride;
  const int64_t out_stride = int64_t(heads) * kDim;
  T* const out = static_cast<T*>(arguments.out) + sequence.start * out_stride + head * kDim;
  float* const lse = arguments.lse + head * attention.rows + sequence.start;
  const int64_t stride = attention.token_stride;
  // with_layout() takes 128 keys of 64 columns only if all sequences fit.
  constexpr bool kFits = kKeys == 128 && kDim == 64;
  const bool whole = kFits || length <= kKeys;
  // A positive factor keeps the order of the scores, so the maximum comes before the product.
  // Otherwise, hide() multiplies.
  const bool rising = attention.scale > 0.0f;
  const float factor = rising ? attention.scale * kLog2E : 1.0f;
  const uint64_t seed = kDropout ? load_global(attention.seed) : 0;

  const auto copy_queries = [&](int first) {
    const int from = first + warp * 16;
    if (from < length) {
      queries.copy_strip(query_rows + from * stride, stride, length - from);
    }
    commit_copies();
  };
  copy_queries(split * kStrip);
  for (int first = split * kStrip; first < length; first += splits * kStrip) {
    const int from = first + warp * 16;
    const bool has_queries = from < length;
    uint32_t query[kDim / 16][4];
    float result[kDim / 8][4] = {};
    float highest[2] = {-1e30f, -1e30f}, sums[2] = {};
    const int end = attention.causal ? min(length, first + kStrip) : length;
    for (int chunk = 0; chunk < (kFits ? 1 : end); chunk += kKeys) {
      const bool copied = !whole || first == split * kStrip;
      if (copied) {
        const int count = min(kKeys, length - chunk), rounded = (count + 31) / 32 * 32;
        if (chunk > 0 || first != split * kStrip) block_barrier();
        keys.copy_sequence(key_rows + chunk * stride, stride, rounded, count, thread_index(),
                           kWarps * 32);
        commit_copies();
        values.copy_sequence(key_rows + attention.part_stride + chunk * stride, stride, rounded,
                             count, thread_index(), kWarps * 32);
        commit_copies();
        if (attention.key_mask) {
          store_visible(visible, attention, sequence, chunk, kKeys, kWarps * 32);
        }
        // The values arrive during the products of the keys.
        wait_for_copies<1>();
        block_barrier();
      } else {
        wait_for_copies<0>();
        warp_barrier();
      }
      // The number of keys of the chunk that these queries can see. Keys and their products come in
      // pairs of tiles of 16.
      const int seen = min(kKeys, (attention.causal ? min(length, from + 16) : length) - chunk);
      float scores[kKeys / 8][4];
      if (has_queries) {
        if (chunk == 0) {
#pragma unroll
          for (int k = 0; k < kDim / 16; ++k) queries.load_left(query[k], 0, k * 16);
        }
#pragma unroll
        for (int pair = 0; pair < kKeys / 32; ++pair) {
          if (pair * 32 >= seen) break;
          float (*const sums_of_pair)[4] = scores + pair * 4;
#pragma unroll
          for (int i = 0; i < 16; ++i) sums_of_pair[i / 4][i % 4] = 0.0f;
#pragma unroll
          for (int k = 0; k < kDim / 16; ++k) {
            uint32_t right[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              load_matrices(right[i], keys.memory,
                            Rows::after(key_place, k * 16) + (pair * 32 + i * 16) * kDim);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              multiply<T>(sums_of_pair[i], query[k], right[i / 2][i % 2 * 2],
                          right[i / 2][i % 2 * 2 + 1]);
            }
          }
        }
      }
      if (copied) {
        wait_for_copies<0>();
        block_barrier();
      }
      if (!has_queries) continue;
      if (chunk == 0) {
        // The queries are now in registers, so their shared memory can take the next ones.
        warp_barrier();
        if (first + splits * kStrip < length) copy_queries(first + splits * kStrip);
      }
      // All queries of the warp see the first `open` keys.
      const int open = attention.key_mask || !rising
                           ? 0
                           : (attention.causal ? min(length, from + 1) : length) - chunk;
      int ends[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int query_row = from + group + row * 8;
        ends[row] = (attention.causal ? min(length, query_row + 1) : length) - chunk - place * 2;
      }
#pragma unroll
      for (int pair = 0; pair < kKeys / 32; ++pair) {
        if (pair * 32 >= seen) break;
        if (pair * 32 + 32 <= open) continue;
#pragma unroll
        for (int half = 0; half < 4; ++half) {
          const int column = pair * 32 + half * 8;
          const Pair shown =
              attention.key_mask ? visible.load_as<Pair>(column + place * 2) : Pair{1.0f, 1.0f};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& score = scores[4 * pair + half][i];
            if (!rising) score *= attention.scale * kLog2E;
            const bool hidden = (i % 2 ? shown.high : shown.low) == 0.0f;
            score = hidden || column + i % 2 >= ends[i / 2] ? -infinity() : score;
          }
        }
      }
      float higher[2] = {-infinity(), -infinity()};
#pragma unroll
      for (int pair = 0; pair < kKeys / 32; ++pair) {
        if (pair * 32 >= seen) break;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          float& one = higher[i / 2 % 2];
          one = fmaxf(one, scores[4 * pair + i / 4][i % 4]);
        }
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        higher[row] = fmaxf(higher[row], shuffle_xor(higher[row], 1));
        higher[row] = fmaxf(higher[row], shuffle_xor(higher[row], 2));
        higher[row] = fmaxf(higher[row] * factor, highest[row]);
        if (chunk > 0) {
          const float fading = exp2_fast(highest[row] - higher[row]);
          sums[row] *= fading;
#pragma unroll
          for (int column = 0; column < kDim / 8; ++column) {
            result[column][2 * row] *= fading;
            result[column][2 * row + 1] *= fading;
          }
        }
        highest[row] = higher[row];
      }
#pragma unroll
      for (int pair = 0; pair < kKeys / 32; ++pair) {
        if (pair * 32 >= seen) break;
#pragma unroll
        for (int half = 0; half < 4; ++half) {
          float (&weights)[4] = scores[4 * pair + half];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            weights[i] = exp2_fast(fmaf(weights[i], factor, -highest[i / 2]));
            sums[i / 2] += weights[i];
          }
          if (kDropout) {
            // A lane draws for a quad of keys and one of its two rows. Its neighbour draws for the
            // other row.
            const uint32_t quad = (chunk + pair * 32 + half * 8) / 4 + place / 2;
            const uint32_t row =
                static_cast<uint32_t>(sequence.start) + from + group + place % 2 * 8;
            const uint32_t drawn = kept_of_quad(seed, attention.threshold, quad, row, head);
            const uint32_t neighbour = shuffle_xor(drawn, 1);
            const uint32_t kept = (place % 2 ? neighbour : drawn) >> place % 2 * 2 & 3;
            const uint32_t kept_below = (place % 2 ? drawn : neighbour) >> place % 2 * 2 & 3;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (!((i < 2 ? kept : kept_below) >> i % 2 & 1)) weights[i] = 0.0f;
            }
          }
        }
#pragma unroll
        for (int tile = 2 * pair; tile < 2 * pair + 2; ++tile) {
          uint32_t left[4];
          pack_left<T>(left, scores[2 * tile], scores[2 * tile + 1]);
#pragma unroll
          for (int column = 0; column < kDim / 16; ++column) {
            uint32_t right[4];
            load_matrices_transposed(right, values.memory,
                                     Rows::after(value_place, column * 16) + tile * 16 * kDim);
            multiply<T>(result[2 * column], left, right[0], right[1]);
            multiply<T>(result[2 * column + 1], left, right[2], right[3]);
          }
        }
      }
    }
    if (!has_queries) continue;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sums[row] += shuffle_xor(sums[row], 1);
      sums[row] += shuffle_xor(sums[row], 2);
      const int query_row = from + group + row * 8;
      if (place == 0 && query_row < length)
        store_global(&lse[query_row], (highest[row] + log2_fast(sums[row])) * kLn2);
      rejoin_lanes();
      const float unit =
          (kDropout ? attention.keep_scale : 1.0f) / (sums[row] == 0.0f ? 1.0f : sums[row]);
#pragma unroll
      for (int column = 0; column < kDim / 8; column += 4) {
        // A lane of the four that share a row gets 8 neighbouring columns.
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&pair)[4] = result[column + i];
          words[i] = pack<T>(pair[2 * row] * unit, pair[2 * row + 1] * unit);
        }
        transpose_words(words);
        if (query_row < length) {
          store_global(reinterpret_cast<Quad*>(out + query_row * out_stride + (column + place) * 8),
                       Quad{{words[0], words[1], words[2], words[3]}});
        }
        rejoin_lanes();
      }
    }
  }
}

// Returns act(layout for these sizes).
template <class T, class Act>
auto with_layout(int dim, int max_length, Act&& act) {
  switch (dim) {
    case 32:
      return act(Layout<T, 32, 256>());
    case 64:
      return max_length <= 128 ? act(Layout<T, 64, 128>()) : act(Layout<T, 64, 256>());
    case 96:
      return act(Layout<T, 96, 128>());
    case 128:
      return act(Layout<T, 128, 128>());
    default:
      throw std::invalid_argument("the head dimension isn't among 32, 64, 96 and 128");
  }
}

template <class T>
void run(const Arguments& arguments) {
  const Attention& attention = arguments.attention;
  with_layout<T>(attention.dim, attention.max_length, [&](auto layout) {
    using Chosen = decltype(layout);
    constexpr int kDim = Chosen::kColumns, kKeys = Chosen::kRows;
    launch(attention.seed ? forward<T, kDim, kKeys, true> : forward<T, kDim, kKeys, false>,
           {attention.sequences * attention.heads * arguments.splits, kWarps * 32, Chosen::kBytes,
            attention.stream},
           arguments);
  });
}

}  // namespace

void attention_forward(const Attention& attention, void* out, float* lse, int splits) {
  const Arguments arguments{attention, out, lse, splits};
  attention.bfloat16 ? run<Bfloat16>(arguments) : run<Half>(arguments);
}

int attention_forward_shared_bytes(int dim, int max_length) {
  return with_layout<Half>(dim, max_length, [](auto layout) { return decltype(layout)::kBytes; });
}

}  // namespace bclip::cuda
