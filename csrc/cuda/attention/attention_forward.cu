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
  static constexpr int kOut = kQuery + Tile<T, kDim>::bytes(kStrip),
                       kVisible = kOut + Tile<T, kDim>::bytes(kStrip);
  static constexpr int kBytes = kVisible + kKeys * 4;
};

template <class T, int kDim, int kKeys, bool kDropout>
__global__ void __launch_bounds__(kWarps * 32, kKeys == 128 && kDim == 64 && !kDropout ? 3 : 2)
    forward(Arguments arguments) {
  using Places = Layout<T, kDim, kKeys>;
  const Attention& attention = arguments.attention;
  const int splits = arguments.splits, heads = attention.heads;
  const int split = block_index() % splits, head = block_index() / splits % heads;
  const Sequence sequence = sequence_of(attention, block_index() / splits / heads);
  const int length = sequence.length;
  if (split * kStrip >= length) return;

  const int warp = warp_index(), lane = lane_index(), group = lane / 4, place = lane % 4;
  const Tile<T, kDim> keys{{Places::kKey}}, values{{Places::kValue}};
  const Tile<T, kDim> queries{{Places::kQuery + warp * Tile<T, kDim>::bytes(16)}};
  const Tile<T, kDim> results{{Places::kOut + warp * Tile<T, kDim>::bytes(16)}};
  const Shared<float> visible{Places::kVisible};
  const T* const query_rows = static_cast<const T*>(attention.qkv) +
                              sequence.start * attention.token_stride +
                              head * attention.head_stride;
  const T* const key_rows = query_rows + attention.part_stride;
  const int64_t out_stride = int64_t(heads) * kDim;
  T* const out = static_cast<T*>(arguments.out) + sequence.start * out_stride + head * kDim;
  float* const lse = arguments.lse + head * attention.rows + sequence.start;
  const int64_t stride = attention.token_stride;
  const bool whole = length <= kKeys;
  const float factor = attention.scale * kLog2E;
  const uint64_t seed = kDropout ? load_global(attention.seed) : 0;

  const auto copy_queries = [&](int first) {
    const int from = first + warp * 16;
    if (from < length) {
      queries.copy_rows(query_rows + from * stride, stride, 16, length - from, lane, 32);
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
    for (int chunk = 0; chunk < end; chunk += kKeys) {
      if (!whole || first == split * kStrip) {
        const int count = min(kKeys, length - chunk), rounded = (count + 15) / 16 * 16;
        if (chunk > 0 || first != split * kStrip) block_barrier();
        keys.copy_rows(key_rows + chunk * stride, stride, rounded, count, thread_index(),
                       kWarps * 32);
        values.copy_rows(key_rows + attention.part_stride + chunk * stride, stride, rounded, count,
                         thread_index(), kWarps * 32);
        commit_copies();
        store_visible(visible, attention, sequence, chunk, kKeys, kWarps * 32);
        wait_for_copies<0>();
        block_barrier();
      } else {
        wait_for_copies<0>();
        warp_barrier();
      }
      if (!has_queries) continue;
      if (chunk == 0) {
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) queries.load_left(query[k], 0, k * 16);
      }
      // The number of keys of the chunk that these queries can see, in tiles of 16.
      const int seen = min(kKeys, (attention.causal ? min(length, from + 16) : length) - chunk);

      float scores[kKeys / 8][4];
      float higher[2] = {highest[0], highest[1]};
#pragma unroll
      for (int tile = 0; tile < kKeys / 16; ++tile) {
        if (tile * 16 >= seen) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[2 * tile][i] = scores[2 * tile + 1][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
          uint32_t right[4];
          keys.load_right_columns(right, tile * 16, k * 16);
          multiply<T>(scores[2 * tile], query[k], right[0], right[1]);
          multiply<T>(scores[2 * tile + 1], query[k], right[2], right[3]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = tile * 16 + half * 8 + place * 2;
          const Pair shown = visible.load_as<Pair>(column);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool late = attention.causal && chunk + column + i % 2 > from + group + i / 2 * 8;
            float& score = scores[2 * tile + half][i];
            score = (i % 2 ? shown.high : shown.low) == 0.0f || late ? -infinity() : score * factor;
            higher[i / 2] = fmaxf(higher[i / 2], score);
          }
        }
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        higher[row] = fmaxf(higher[row], shuffle_xor(higher[row], 1));
        higher[row] = fmaxf(higher[row], shuffle_xor(higher[row], 2));
        const float fading = exp2_fast(highest[row] - higher[row]);
        sums[row] *= fading;
        highest[row] = higher[row];
        if (chunk > 0) {
#pragma unroll
          for (int column = 0; column < kDim / 8; ++column) {
            result[column][2 * row] *= fading;
            result[column][2 * row + 1] *= fading;
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < kKeys / 16; ++tile) {
        if (tile * 16 >= seen) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float (&weights)[4] = scores[2 * tile + half];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            weights[i] = exp2_fast(weights[i] - highest[i / 2]);
            sums[i / 2] += weights[i];
          }
          if (kDropout) {
            // A lane draws for a quad of keys and one of its two rows. Its neighbour draws for the
            // other row.
            const uint32_t quad = (chunk + tile * 16 + half * 8) / 4 + place / 2;
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
        uint32_t left[4];
        pack_left<T>(left, scores[2 * tile], scores[2 * tile + 1]);
#pragma unroll
        for (int column = 0; column < kDim / 16; ++column) {
          uint32_t right[4];
          values.load_right_rows(right, tile * 16, column * 16);
          multiply<T>(result[2 * column], left, right[0], right[1]);
          multiply<T>(result[2 * column + 1], left, right[2], right[3]);
        }
      }
    }
    // The queries are now in registers, so their shared memory can take the next ones.
    warp_barrier();
    if (first + splits * kStrip < length) copy_queries(first + splits * kStrip);
    if (!has_queries) continue;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sums[row] += shuffle_xor(sums[row], 1);
      sums[row] += shuffle_xor(sums[row], 2);
      const int query_row = from + group + row * 8;
      if (place == 0 && query_row < length)
        store_global(&lse[query_row], (highest[row] + log2_fast(sums[row])) * kLn2);
      const float unit =
          (kDropout ? attention.keep_scale : 1.0f) / (sums[row] == 0.0f ? 1.0f : sums[row]);
#pragma unroll
      for (int column = 0; column < kDim / 8; ++column) {
        results.memory.template store_as<uint32_t>(
            results.index_of_pair(group + row * 8, column * 8 + place * 2),
            pack<T>(result[column][2 * row] * unit, result[column][2 * row + 1] * unit));
      }
    }
    warp_barrier();
    results.store_rows(out + from * out_stride, out_stride, min(16, length - from), lane, 32);
    warp_barrier();
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
