// The products of a warp in the backward pass: parts of dK and dV, and a part of dQ.
#pragma once

#include "csrc/cuda/attention/attention.cuh"

namespace bclip::cuda {

// The sizes of a block and the places in its shared memory. A warp holds the sums of dK and dV for
// kKeyTiles tiles of 16 keys. A part of dQ has kPartRows queries and kPartColumns columns.
// Registers limit these sizes. Two blocks share a multiprocessor if registers and memory allow.
template <class T, int kDim, int kWarps>
struct Layout {
  static constexpr int kColumns = kDim, kThreads = 32 * kWarps, kBlocks = kWarps == 4 ? 2 : 1;
  static constexpr int kKeyTiles = kDim <= 64 ? 2 : 1;
  static constexpr int kKeysPerWarp = 16 * kKeyTiles, kKeys = kWarps * kKeysPerWarp;
  static constexpr int kPartRows = kDim == 64 || kDim == 96 ? 32 : 16, kPartColumns = kDim / 2;
  static constexpr int kParts = kWarps / 2, kStrip = kParts * kPartRows;
  static constexpr int kRows = Tile<T, kDim>::bytes(kStrip);
  static constexpr int kKey = 0, kValue = Tile<T, kDim>::bytes(kKeys), kQuery = 2 * kValue;
  static constexpr int kGrad = kQuery + kRows, kScoresGrad = kGrad + kRows;
  static constexpr int kDelta = kScoresGrad + Tile<T, kStrip>::bytes(kKeys);
  static constexpr int kLse = kDelta + kStrip * 4, kVisible = kLse + kStrip * 4,
                       kBytes = kVisible + kKeys * 4;
};

// The first rows of a warp's tiles: in shared memory, and in the sequence.
struct Place {
  int row, key;      // first key
  int strip, query;  // first query
  int head;
  const Sequence& sequence;
};

// sums += left right^T, for kLeftTiles tiles of 16 rows and kHalves halves of such tiles.
template <class T, int kDim, int kLeftTiles, int kHalves>
__device__ __forceinline__ void multiply_rows(float (&sums)[kLeftTiles][kHalves][4],
                                              const Tile<T, kDim>& left, int left_row,
                                              const Tile<T, kDim>& right, int right_row) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t columns[kHalves / 2][4];
#pragma unroll
    for (int tile = 0; tile < kHalves / 2; ++tile) {
      right.load_right_columns(columns[tile], right_row + tile * 16, k * 16);
    }
#pragma unroll
    for (int tile = 0; tile < kLeftTiles; ++tile) {
      uint32_t rows[4];
      left.load_left(rows, left_row + tile * 16, k * 16);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const uint32_t* const column = columns[half / 2] + half % 2 * 2;
        multiply<T>(sums[tile][half], rows, column[0], column[1]);
      }
    }
  }
}

// One bit for each element of a fragment of 16 keys x 8 queries: whether dropout keeps its weight.
__device__ __forceinline__ uint32_t kept_of_fragment(const Attention& attention, const Place& at,
                                                     int tile, int half) {
  const int lane = lane_index(), group = lane / 4, place = lane % 4;
  // Lane 8 q + i draws for quad q of the 16 keys and query i of the 8.
  const uint32_t query = static_cast<uint32_t>(at.sequence.start) + at.query + half * 8 + lane % 8;
  const uint32_t drawn = kept_of_quad(load_global(attention.seed), attention.threshold,
                                      (at.key + tile * 16) / 4 + lane / 8, query, at.head);
  const int source = group / 4 * 8 + place * 2;
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    kept |= (shuffle(drawn, source + i % 2 + i / 2 * 16) >> group % 4 & 1) << i;
  }
  return kept;
}

// dK or dV of the keys of a warp.
template <class Places>
using Sums = float[Places::kKeyTiles][Places::kColumns / 8][4];

// Adds the terms of kQueryTiles tiles of queries to dK and dV of the first kKeyTiles tiles of a
// warp, and stores dS^T. An element of K or V is read from shared memory once for all these
// queries, and one of Q or dO once for all these keys.
template <class T, class Places, int kKeyTiles, int kQueryTiles, bool kDropout>
__device__ __forceinline__ void add_key_value_grads(Sums<Places>& key_grad,
                                                    Sums<Places>& value_grad,
                                                    const Attention& attention, const Place& at) {
  constexpr int kDim = Places::kColumns;
  const int lane = lane_index(), group = lane / 4, place = lane % 4;
  const Tile<T, kDim> keys{{Places::kKey}}, values{{Places::kValue}}, queries{{Places::kQuery}},
      grads{{Places::kGrad}};
  const Tile<T, Places::kStrip> scores_grads{{Places::kScoresGrad}};  // (key, query)
  const Shared<float> deltas{Places::kDelta}, row_lse{Places::kLse}, visible{Places::kVisible};
  const float factor = attention.scale * kLog2E,
              keep_scale = kDropout ? attention.keep_scale : 1.0f;

  float scores[kKeyTiles][2 * kQueryTiles][4] = {},
                              weights_grad[kKeyTiles][2 * kQueryTiles][4] = {};
  multiply_rows<T, kDim>(scores, keys, at.row, queries, at.strip);
  multiply_rows<T, kDim>(weights_grad, values, at.row, grads, at.strip);
#pragma unroll
  for (int half = 0; half < 2 * kQueryTiles; ++half) {
    const int column = at.strip + half * 8 + place * 2;
    const Pair delta = deltas.load_as<Pair>(column), high = row_lse.load_as<Pair>(column);
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
      const int row = at.row + tile * 16 + group;
      const uint32_t kept = kDropout ? kept_of_fragment(attention, at, tile, half) : 0xf;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float &score = scores[tile][half][i], &weight_grad = weights_grad[tile][half][i];
        const bool keeps = kept >> i & 1;
        const float weight = exp2_fast(score * factor - (i % 2 ? high.high : high.low));
        const float through = keeps ? weight_grad * keep_scale : 0.0f;
        score = keeps ? weight : 0.0f;
        weight_grad = weight * (through - (i % 2 ? delta.high : delta.low));
      }
      // Only tiles at an edge have an element that is masked.
      if (attention.causal || attention.key_mask || at.key + tile * 16 + 16 > at.sequence.length) {
        const float shown[2] = {visible.load(row), visible.load(row + 8)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool late = attention.causal && at.key + tile * 16 + group + i / 2 * 8 >
                                                    at.query + half * 8 + place * 2 + i % 2;
          if (late || shown[i / 2] == 0.0f) {
            scores[tile][half][i] = weights_grad[tile][half][i] = 0.0f;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        scores_grads.memory.template store_as<uint32_t>(
            scores_grads.index_of_pair(row + i / 2 * 8, column),
            pack<T>(weights_grad[tile][half][i], weights_grad[tile][half][i + 1]));
      }
    }
  }
  uint32_t weights[kKeyTiles][kQueryTiles][4], weights_grads[kKeyTiles][kQueryTiles][4];
#pragma unroll
  for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
    for (int query = 0; query < kQueryTiles; ++query) {
      pack_left<T>(weights[tile][query], scores[tile][2 * query], scores[tile][2 * query + 1]);
      pack_left<T>(weights_grads[tile][query], weights_grad[tile][2 * query],
                   weights_grad[tile][2 * query + 1]);
    }
  }
#pragma unroll
  for (int query_tile = 0; query_tile < kQueryTiles; ++query_tile) {
#pragma unroll
    for (int column = 0; column < kDim / 16; ++column) {
      uint32_t grad[4], query[4];
      grads.load_right_rows(grad, at.strip + query_tile * 16, column * 16);
      queries.load_right_rows(query, at.strip + query_tile * 16, column * 16);
#pragma unroll
      for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          multiply<T>(value_grad[tile][2 * column + half], weights[tile][query_tile],
                      grad[2 * half], grad[2 * half + 1]);
          multiply<T>(key_grad[tile][2 * column + half], weights_grads[tile][query_tile],
                      query[2 * half], query[2 * half + 1]);
        }
      }
    }
  }
}

// sums = dS K of the first `rows` keys, for kTiles tiles of 16 queries from `strip` on and for the
// columns from `part` on.
template <class T, class Places, int kTiles, int kPartColumns8>
__device__ __forceinline__ void query_grads(float (&sums)[kTiles][kPartColumns8][4], int rows,
                                            int strip, int part) {
  const Tile<T, Places::kColumns> keys{{Places::kKey}};
  const Tile<T, Places::kStrip> scores_grads{{Places::kScoresGrad}};
#pragma unroll 2
  for (int row = 0; row < rows; row += 16) {
    uint32_t left[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      scores_grads.load_left_transposed(left[tile], row, strip + tile * 16);
    }
#pragma unroll
    for (int column = 0; column < kPartColumns8 / 2; ++column) {
      uint32_t right[4];
      keys.load_right_rows(right, row, part + column * 16);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply<T>(sums[tile][2 * column], left[tile], right[0], right[1]);
        multiply<T>(sums[tile][2 * column + 1], left[tile], right[2], right[3]);
      }
    }
  }
}

}  // namespace bclip::cuda
