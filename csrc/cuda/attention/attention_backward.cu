// A block of warps for a sequence and a head. It holds K and V of up to KEYS keys in shared memory, each warp the sums
// of dK and dV for its own 16 or 32 of them in registers, and goes through strips of 64 queries: S^T and (dO V^T)^T,
// from which P^T and dS^T are left operands of dV and dK as they come; dS^T then goes through shared memory, where the
// warps share out dQ = dS K. Five products where one kernel for dQ and one for dK and dV would need seven, and no
// atomics. Where a sequence has more keys, the block goes through them in chunks and adds up dQ in `workspace`.
#include "csrc/cuda/attention/attention.cuh"

#include <stdexcept>

namespace bclip::cuda {
namespace {

constexpr int STRIP = 64;

struct Arguments {
  Attention attention;
  AttentionGradient gradient;
};

template <class T, int DIM, int WARPS>
struct Layout {
  static constexpr int COLUMNS = DIM, KEYS_OF_WARP = DIM <= 64 ? 32 : 16, KEYS = WARPS * KEYS_OF_WARP;
  static constexpr int ROWS = Tile<T, DIM>::bytes(STRIP);
  static constexpr int KEY = 0, VALUE = Tile<T, DIM>::bytes(KEYS), QUERY = 2 * VALUE;
  static constexpr int GRAD = QUERY + 2 * ROWS;  // both twice: the next strip comes while this one is worked on
  static constexpr int SCORES_GRAD = GRAD + 2 * ROWS, DELTA = SCORES_GRAD + Tile<T, STRIP>::bytes(KEYS);
  static constexpr int LSE = DELTA + STRIP * 4, VISIBLE = LSE + STRIP * 4, BYTES = VISIBLE + KEYS * 4;
};

template <class T, int DIM, int WARPS, bool DROPOUT>
__global__ void __launch_bounds__(WARPS * 32, 1) backward(Arguments arguments) {
  using Places = Layout<T, DIM, WARPS>;
  constexpr int KEYS = Places::KEYS, OWN = Places::KEYS_OF_WARP, THREADS = WARPS * 32;
  // dQ of a strip: 4 blocks of 16 rows, and as many parts of the columns as that takes.
  constexpr int PART = DIM / (WARPS / 4);
  const Attention& attention = arguments.attention;
  const AttentionGradient& gradient = arguments.gradient;
  const int heads = attention.heads, head = block_index() % heads;
  const Sequence sequence = sequence_of(attention, block_index() / heads);
  const int length = sequence.length;

  const int warp = warp_index(), lane = lane_index(), group = lane / 4, place = lane % 4;
  const Tile<T, DIM> keys{{Places::KEY}}, values{{Places::VALUE}};
  const Tile<T, STRIP> scores_grads{{Places::SCORES_GRAD}};  // (key, query)
  const Shared<float> deltas{Places::DELTA}, row_lse{Places::LSE}, visible{Places::VISIBLE};
  const int64_t stride = attention.token_stride, grad_stride = gradient.out_grad_token_stride;
  const int64_t out_stride = int64_t(heads) * DIM;
  const T* const query_rows =
      static_cast<const T*>(attention.qkv) + sequence.start * stride + head * attention.head_stride;
  const T* const key_rows = query_rows + attention.part_stride;
  const T* const grad_rows =
      static_cast<const T*>(gradient.out_grad) + sequence.start * grad_stride + head * gradient.out_grad_head_stride;
  const T* const out_rows = static_cast<const T*>(gradient.out) + sequence.start * out_stride + head * DIM;
  // Of what the loops within need no more than once an address, nothing is kept in registers: there is none to spare.
  const auto qkv_grad = [&](int row) {
    return static_cast<T*>(gradient.qkv_grad) + (sequence.start + row) * 3 * out_stride + head * DIM;
  };
  const auto lse = [&](int row) { return gradient.lse[head * attention.rows + sequence.start + row]; };
  const float factor = attention.scale * LOG2_E, keep_scale = DROPOUT ? attention.keep_scale : 1.0f;

  const auto copy_strip = [&](int first, int stage) {
    if (first < length) {
      const int here = min(STRIP, length - first);
      const Tile<T, DIM> queries{{Places::QUERY + stage * Places::ROWS}}, grads{{Places::GRAD + stage * Places::ROWS}};
      queries.copy_rows(query_rows + first * stride, stride, STRIP, here, thread_index(), THREADS);
      grads.copy_rows(grad_rows + first * grad_stride, grad_stride, STRIP, here, thread_index(), THREADS);
    }
    commit_copies();
  };

  for (int chunk = 0; chunk < length; chunk += KEYS) {
    const int here = min(KEYS, length - chunk), rounded = (here + 15) / 16 * 16;
    block_barrier();
    keys.copy_rows(key_rows + chunk * stride, stride, rounded, here, thread_index(), THREADS);
    values.copy_rows(key_rows + attention.part_stride + chunk * stride, stride, rounded, here, thread_index(), THREADS);
    store_visible(visible, attention, sequence, chunk, KEYS, THREADS);
    float key_grad[OWN / 16][DIM / 8][4] = {}, value_grad[OWN / 16][DIM / 8][4] = {};
    // Queries before the chunk see nothing of it.
    const int first_strip = attention.causal ? chunk / STRIP * STRIP : 0;
    int stage = 0;
    copy_strip(first_strip, 0);
    for (int first = first_strip; first < length; first += STRIP, stage ^= 1) {
      copy_strip(first + STRIP, stage ^ 1);
      wait_for_copies<1>();
      block_barrier();
      const Tile<T, DIM> queries{{Places::QUERY + stage * Places::ROWS}}, grads{{Places::GRAD + stage * Places::ROWS}};
      // Four lanes to a row.
      for (int index = thread_index(); index < STRIP * 4; index += THREADS) {
        const int row = index / 4;
        float delta = 0.0f;
        if (first + row < length) {
#pragma unroll
          for (int part = 0; part < DIM / 32; ++part) {
            const int column = part * 32 + index % 4 * 8;
            const Quad grad = grads.memory.template load_as<Quad>(grads.index(row, column));
            const Quad out = *reinterpret_cast<const Quad*>(out_rows + (first + row) * out_stride + column);
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
          const float value = first + row < length ? lse(first + row) * LOG2_E : 0.0f;
          deltas.store(row, delta);
          // Of a row with nothing to attend to, whose weights are zero anyway, anything finite.
          row_lse.store(row, value == -infinity() ? 0.0f : value);
        }
      }
      block_barrier();

#pragma unroll 1
      for (int strip = 0; strip < STRIP; strip += 16) {
        if (first + strip >= length || chunk + warp * OWN >= length) break;
        float scores[OWN / 16][2][4] = {}, weights_grad[OWN / 16][2][4] = {};
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
          uint32_t query[4], grad[4];
          queries.load_right_columns(query, strip, k * 16);
          grads.load_right_columns(grad, strip, k * 16);
#pragma unroll
          for (int tile = 0; tile < OWN / 16; ++tile) {
            const int row = warp * OWN + tile * 16;
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
        for (int tile = 0; tile < OWN / 16; ++tile) {
          const int row = warp * OWN + tile * 16;
          if (chunk + row >= length) continue;
          const float shown[2] = {visible.load(row + group), visible.load(row + group + 8)};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int column = strip + half * 8 + place * 2;
            const Pair delta = deltas.load_as<Pair>(column), high = row_lse.load_as<Pair>(column);
            uint32_t kept = 0xf;  // of (row, row + 8) x (column, column + 1), numbered as the fragment
            if (DROPOUT) {
              // Lane 8 q + i draws for quad q of the 16 keys and query i of the 8.
              const uint32_t query = static_cast<uint32_t>(sequence.start) + first + strip + half * 8 + lane % 8;
              const uint32_t drawn =
                  kept_of_quad(*attention.seed, attention.threshold, (chunk + row) / 4 + lane / 8, query, head);
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
              const bool late = attention.causal && chunk + row + group + i / 2 * 8 > first + column + i % 2;
              const bool seen = shown[i / 2] != 0.0f && !late, keeps = kept >> i & 1;
              const float weight = seen ? exp2_fast(score * factor - (i % 2 ? high.high : high.low)) : 0.0f;
              const float through = keeps ? weight_grad * keep_scale : 0.0f;
              score = keeps ? weight : 0.0f;
              weight_grad = seen ? weight * (through - (i % 2 ? delta.high : delta.low)) : 0.0f;
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
          for (int column = 0; column < DIM / 16; ++column) {
            uint32_t grad[4], query[4];
            grads.load_right_rows(grad, strip, column * 16);
            queries.load_right_rows(query, strip, column * 16);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              multiply<T>(value_grad[tile][2 * column + half], weights, grad[2 * half], grad[2 * half + 1]);
              multiply<T>(key_grad[tile][2 * column + half], weights_grads, query[2 * half], query[2 * half + 1]);
            }
          }
        }
      }
      block_barrier();

      const int strip = warp % 4 * 16, part = warp / 4 * PART;
      if (first + strip >= length) continue;
      float sum[PART / 8][4] = {};
#pragma unroll 2
      for (int row = 0; row < rounded; row += 16) {
        uint32_t left[4];
        scores_grads.load_left_transposed(left, row, strip);
#pragma unroll
        for (int column = 0; column < PART / 16; ++column) {
          uint32_t right[4];
          keys.load_right_rows(right, row, part + column * 16);
          multiply<T>(sum[2 * column], left, right[0], right[1]);
          multiply<T>(sum[2 * column + 1], left, right[2], right[3]);
        }
      }
      const int last_key = attention.causal ? min(length, first + STRIP) : length;
      const bool begins = chunk == 0, ends = chunk + KEYS >= last_key;
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = first + strip + group + i / 2 * 8;
        if (row >= length) continue;
        T* const to = qkv_grad(row) + part + place * 2;
        float* const added = begins && ends ? nullptr
                                            : gradient.workspace + (sequence.start + row) * out_stride + head * DIM +
                                                  part + place * 2;
#pragma unroll
        for (int column = 0; column < PART / 8; ++column) {
          Pair value{sum[column][i], sum[column][i + 1]};
          if (!begins) {
            const Pair before = *reinterpret_cast<const Pair*>(added + column * 8);
            value = {value.low + before.low, value.high + before.high};
          }
          if (ends) {
            *reinterpret_cast<uint32_t*>(to + column * 8) =
                pack<T>(value.low * attention.scale, value.high * attention.scale);
          } else {
            *reinterpret_cast<Pair*>(added + column * 8) = value;
          }
        }
      }
    }
    // Copies of a strip that isn't there are groups without any: nothing is under way. K and V were read for the last
    // time, and each warp leaves its gradients in its own rows.
    wait_for_copies<0>();
    block_barrier();
    const int row = warp * OWN, count = min(OWN, length - chunk - row);
    if (count <= 0) continue;
#pragma unroll
    for (int tile = 0; tile < OWN / 16; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int own = row + tile * 16 + group + i / 2 * 8;
#pragma unroll
        for (int column = 0; column < DIM / 8; ++column) {
          const int index = keys.index_of_pair(own, column * 8 + place * 2);
          const float(&key)[4] = key_grad[tile][column];
          const float(&value)[4] = value_grad[tile][column];
          keys.memory.template store_as<uint32_t>(
              index, pack<T>(key[i] * attention.scale, key[i + 1] * attention.scale));
          values.memory.template store_as<uint32_t>(index, pack<T>(value[i] * keep_scale, value[i + 1] * keep_scale));
        }
      }
    }
    warp_barrier();
    T* const to = qkv_grad(chunk + row) + out_stride;
    const Tile<T, DIM> own_keys{{Places::KEY + Tile<T, DIM>::bytes(row)}};
    const Tile<T, DIM> own_values{{Places::VALUE + Tile<T, DIM>::bytes(row)}};
    own_keys.store_rows(to, 3 * out_stride, count, lane, 32);
    own_values.store_rows(to + out_stride, 3 * out_stride, count, lane, 32);
  }
}

// What act returns of the layout for these sizes. Where a block may have less than the 129.5 KiB that 256 keys of 64
// elements take (sm_86, sm_89 and sm_120 give it 99), they go through in chunks of 128.
template <class T, class Act>
auto with_layout(int dim, int max_length, int block_bytes, Act&& act) {
  switch (dim) {
    case 32:
      return act(Layout<T, 32, 8>());
    case 64:
      return max_length <= 128 || block_bytes < Layout<T, 64, 8>::BYTES ? act(Layout<T, 64, 4>())
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
    constexpr int WARPS = Chosen::KEYS / Chosen::KEYS_OF_WARP;
    launch(attention.seed ? backward<T, Chosen::COLUMNS, WARPS, true> : backward<T, Chosen::COLUMNS, WARPS, false>,
           {attention.sequences * attention.heads, WARPS * 32, Chosen::BYTES, attention.stream}, arguments);
  });
}

}  // namespace

void attention_backward(const Attention& attention, const AttentionGradient& gradient) {
  const int keys = attention_backward_keys(attention.dim, attention.max_length, attention.block_bytes);
  if (attention.max_length > keys && !gradient.workspace) {
    throw std::invalid_argument("rows this long need a workspace");
  }
  const Arguments arguments{attention, gradient};
  attention.bfloat16 ? run<Bfloat16>(arguments) : run<Half>(arguments);
}

int attention_backward_keys(int dim, int max_length, int block_bytes) {
  return with_layout<Half>(dim, max_length, block_bytes, [](auto layout) { return decltype(layout)::KEYS; });
}

int attention_backward_shared_bytes(int dim, int max_length, int block_bytes) {
  return with_layout<Half>(dim, max_length, block_bytes, [](auto layout) { return decltype(layout)::BYTES; });
}

}  // namespace bclip::cuda
