// The kernels themselves, for an engine that multiplies and a type in memory. Included by each
// attention_<instruction set>.cpp, which chose the target before.
//
// Matrices are in blocks of 32 x 32, padded with zeros. A left operand (M, K) is [M / 32][K / 32][block], a right one
// (K, N) is [N / 32][K / 32][block]; what a block looks like inside is the engine's affair. A row of scores is there as
// a whole, so no maximum has to run along with it, and P is made in the layout that the next product reads. Backward,
// P and dS are also right operands, packed while they are in registers: dV^T = dO^T P and dK^T = Q^T dS then need no
// transposition of anything (n, n).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "csrc/cpu/attention/attention_kernels.h"
#include "csrc/cpu/simd/vec.h"

namespace {

using bclip::cpu::AttentionKernels;
using bclip::cpu::Head;
using bclip::cpu::HeadGradient;
using bclip::cpu::HeadOutput;

constexpr int64_t kPanel = 32;
constexpr int64_t kBlock = kPanel * kPanel;
constexpr int64_t kStripPanels = 8;  // of queries, whose P and dS (2 * 256 keys * 256) stay in L2
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

BCLIP_INLINE int64_t panels_of(int64_t size) { return (size + kPanel - 1) / kPanel; }

// What of `size` falls into panel `index`.
BCLIP_INLINE int64_t within(int64_t size, int64_t index) { return std::min(kPanel, size - index * kPanel); }

}  // namespace

#include "csrc/cpu/attention/single_query_attention-inl.h"

namespace {

// A square matrix, a register a row, transposed by exchanging ever larger squares.
template <int kSquare>
BCLIP_INLINE void exchange(WordRegister* rows) {
  if constexpr (kSquare < kRegisterLanes) {
    WordRegister first = {}, second = {};  // indices into the pair of rows
    for (uint32_t i = 0; i < kRegisterLanes; ++i) {
      first[i] = i & kSquare ? i - kSquare + kRegisterLanes : i;
      second[i] = i & kSquare ? i + kRegisterLanes : i + kSquare;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRegisterLanes; ++i) {
      if (i & kSquare) continue;
      const WordRegister above = rows[i], below = rows[i + kSquare];
      rows[i] = pick(above, below, first);
      rows[i + kSquare] = pick(above, below, second);
    }
  }
}

BCLIP_INLINE void transpose(WordRegister* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
  exchange<8>(rows);
}

// A 16 x 16 matrix of 32-bit numbers, whatever they hold; strides count them.
BCLIP_INLINE void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  const auto* const source = static_cast<const uint32_t*>(from);
  auto* const target = static_cast<uint32_t*>(to);
  for (int64_t i = 0; i < kLanes; i += kRegisterLanes)
    for (int64_t j = 0; j < kLanes; j += kRegisterLanes) {
      WordRegister rows[kRegisterLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kRegisterLanes; ++k) rows[k] = load_as<WordRegister>(source + (i + k) * from_stride + j);
      transpose(rows);
#pragma GCC unroll 16
      for (int k = 0; k < kRegisterLanes; ++k) store_as(target + (j + k) * to_stride + i, rows[k]);
    }
}

// Joins the elements of each of 16 rows: lane i of the result is row i's. `join` takes vectors of any width. One row by
// itself would wait for each of its steps.
template <class V, class Join>
BCLIP_INLINE FloatRegister join_halves(V vector, const Join& join) {
  if constexpr (kIsPair<V>)
    return join_halves(join(vector.low, vector.high), join);
  else
    return vector;
}

template <class Join>
BCLIP_INLINE Lanes reduce(const Lanes* rows, const Join& join) {
  float joined[kLanes];
  for (int first = 0; first < kLanes; first += kRegisterLanes) {
    WordRegister parts[kRegisterLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kRegisterLanes; ++i) parts[i] = (WordRegister)join_halves(rows[first + i], join);
    transpose(parts);
#pragma GCC unroll 4
    for (int width = kRegisterLanes / 2; width; width /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i)
        parts[i] = (WordRegister)join((FloatRegister)parts[i], (FloatRegister)parts[i + width]);
    store_as(joined + first, parts[0]);
  }
  return load(joined);
}

// Which weights of a head are kept: Philox4x32-10, whose first two rounds and half of the third depend on the key or on
// the query alone, and are done once. Eight counters, 32 keys, go at a time; of a 64-bit lane the low half counts.
class Dropout {
 public:
  static int64_t bytes(const Head& head) { return head.dropout ? panels_of(head.rows) * kTableWords * sizeof(uint64_t) : 0; }

  Dropout(const Head& head, char* tables) : head_(head), tables_(reinterpret_cast<uint64_t*>(tables)) {
    for (int round = 0; round < 10; ++round) {
      keys_[round][0] = head.seed[0] + round * 0x9E3779B9u;
      keys_[round][1] = head.seed[1] + round * 0xBB67AE85u;
    }
    const uint64_t product = uint64_t{kSecond} * head.head;
    first_row_ = static_cast<uint32_t>(product >> 32) ^ keys_[0][0];
    if (!head.dropout) return;
    for (int64_t panel = 0; panel < panels_of(head.rows); ++panel) {
      // In this order two interleavings bring the words into that of the keys.
      constexpr uint64_t order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
      const WideWords counter = load_as<WideWords>(order) + static_cast<uint64_t>(8 * panel);
      const WideWords by_first = times(counter, kFirst);
      const WideWords by_second = times((by_first >> 32) ^ keys_[0][1], kSecond);
      const WideWords next = times((by_second >> 32) ^ (static_cast<uint32_t>(product) ^ keys_[1][0]), kFirst);
      uint64_t* const table = tables_ + panel * kTableWords;
      store_as(table, by_first);
      store_as(table + 8, by_second ^ keys_[2][0]);
      store_as(table + 16, (next >> 32) ^ keys_[2][1]);
      store_as(table + 24, next);
    }
  }

  // -1 in the lanes of the keys that query `row` of the sequence keeps, of the 32 keys of a panel.
  BCLIP_MEMBER_INLINE void keep(int64_t row, int64_t panel, IntLanes kept[2]) const {
    const uint64_t product = uint64_t{kFirst} * (first_row_ ^ (head_.first_row + static_cast<uint32_t>(row)));
    const uint64_t* const table = tables_ + panel * kTableWords;
    const WideWords mixed = times(load_as<WideWords>(table) ^ (product >> 32 ^ keys_[1][1]), kSecond);
    WideWords a = (mixed >> 32) ^ load_as<WideWords>(table + 8), b = mixed;
    WideWords c = load_as<WideWords>(table + 16) ^ (product & 0xFFFFFFFF), d = load_as<WideWords>(table + 24);
    for (int round = 3; round < 10; ++round) {
      const WideWords by_first = times(a, kFirst), by_second = times(c, kSecond);
      a = (by_second >> 32) ^ b ^ keys_[round][0];
      c = (by_first >> 32) ^ d ^ keys_[round][1];
      b = by_second;
      d = by_first;
    }
    const WideWords low = (a & 0xFFFFFFFF) | b << 32, high = (c & 0xFFFFFFFF) | d << 32;
    kept[0] = as<Words>(interleave<false>(low, high)) >= head_.threshold;
    kept[1] = as<Words>(interleave<true>(low, high)) >= head_.threshold;
  }

 private:
  static constexpr uint32_t kFirst = 0xD2511F53, kSecond = 0xCD9E8D57;
  static constexpr int64_t kTableWords = 32;  // of a panel: four vectors

  const Head& head_;
  uint64_t* const tables_;
  uint64_t keys_[10][2];
  uint32_t first_row_;
};

// Hands out pieces of the scratch; without memory it counts what they need.
class Scratch {
 public:
  explicit Scratch(char* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    char* const piece = memory_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* const memory_;
  int64_t used_ = 0;
};

}  // namespace

#include "csrc/cpu/attention/attention_float.h"

namespace {

template <class Engine, class Stored>
struct HeadKernels {
  using Element = typename Engine::Element;
  using Put = void (*)(const Element* block, Element* to);

  // What a matrix (rows, dim) in memory becomes: blocks of itself or of its transpose.
  struct Packing {
    Put put;  // null: as it is, which is a left operand
    Element* to;
    bool by_dim;  // the panels are of dims, the steps of rows
  };

  static void pack(const void* matrix, int64_t stride, const Head& head, std::initializer_list<Packing> packings) {
    const int64_t row_panels = panels_of(head.rows), dim_panels = panels_of(head.dim);
    alignas(64) Element block[kBlock];
    for (int64_t i = 0; i < row_panels; ++i) {
      for (int64_t j = 0; j < dim_panels; ++j) {
        const Stored* from = static_cast<const Stored*>(matrix) + i * kPanel * stride + j * kPanel;
        Engine::load_rows(from, stride, head.rows - i * kPanel, head.dim - j * kPanel, block);
        for (const Packing& packing : packings) {
          Element* to = packing.to + (packing.by_dim ? j * row_panels + i : i * dim_panels + j) * kBlock;
          if (packing.put)
            packing.put(block, to);
          else
            std::memcpy(to, block, sizeof block);
        }
      }
    }
  }

  // Rows of numbers, times `factor`, as they go into memory.
  static void write_row(const float* from, int64_t dim, float factor, Stored* to) {
    for (int64_t i = 0; i < dim; i += kLanes) store(to + i, load(from + i) * factor);
  }

  // Which keys a query sees.
  struct Sight {
    int32_t* visible;  // -1 or 0 for each key, 0 in the padding
    bool masked, causal;
    int64_t rows;

    void fill(const Head& head) {
      masked = head.key_mask != nullptr;
      causal = head.causal;
      rows = head.rows;
      for (int64_t key = 0; key < panels_of(rows) * kPanel; ++key)
        visible[key] = key < rows && (!masked || head.key_mask[key]) ? -1 : 0;
    }

    // Panels of keys that some query of the panel may see, and those first ones that every query sees whole.
    int64_t panels(int64_t query_panel) const { return causal ? query_panel + 1 : panels_of(rows); }
    int64_t whole(int64_t query_panel) const { return masked ? 0 : causal ? query_panel : rows / kPanel; }

    BCLIP_MEMBER_INLINE IntLanes at(int64_t row, int64_t key) const {
      const IntLanes seen = load_as<IntLanes>(visible + key);
      return causal ? seen & (iota() <= static_cast<int32_t>(row - key)) : seen;
    }
  };

  struct Forward {
    Element *query, *key, *value, *weights;
    float *scores, *out;
    Sight sight;
    char* tables;

    Forward(const Head& head, Scratch& scratch) {
      const int64_t panels = panels_of(head.rows), size = panels * panels_of(head.dim) * kBlock;
      query = scratch.take<Element>(size);
      key = scratch.take<Element>(size);
      value = scratch.take<Element>(size);
      weights = scratch.take<Element>(panels * kBlock);
      scores = scratch.take<float>(panels * kBlock);
      out = scratch.take<float>(panels_of(head.dim) * kBlock);
      sight.visible = scratch.take<int32_t>(panels * kPanel);
      tables = scratch.take<char>(Dropout::bytes(head));
    }
  };

  // The weights of 16 queries before they are divided by their sum, into left blocks: 2^(score - highest of the query).
  template <bool kDropout>
  static void softmax_rows(const Head& head, const Dropout& dropout, const Forward& work, int64_t query_panel,
                           int64_t first, float* highest, float* total) {
    const Lanes nothing = splat(-__builtin_inff());
    const Sight& sight = work.sight;
    const int64_t width = panels_of(head.rows) * kPanel, query = query_panel * kPanel + first;
    const int64_t panels = sight.panels(query_panel), whole = sight.whole(query_panel);
    const int64_t count = std::min<int64_t>(kLanes, head.rows - query);
    const float* scores = work.scores + first * width;
    const Lanes factor = splat(head.scale * kLog2E);
    Lanes rows[kLanes] = {};
    for (int64_t row = 0; row < count; ++row) {
      const float* from = scores + row * width;
      Lanes tops[2] = {nothing, nothing};
      for (int64_t key = 0; key < whole * kPanel; key += kPanel)
        for (int half = 0; half < 2; ++half)
          tops[half] = larger(load(from + key + half * kLanes) * factor, tops[half]);
      for (int64_t key = whole * kPanel; key < panels * kPanel; key += kLanes)
        tops[0] = larger(select(sight.at(query + row, key), load(from + key) * factor, nothing), tops[0]);
      rows[row] = larger(tops[0], tops[1]);
    }
    const Lanes top = reduce(rows, [](auto a, auto b) __attribute__((always_inline)) { return select(a > b, a, b); });
    store(highest, top);
    float offsets[kLanes];
    store(offsets, select(top == nothing, Lanes{}, top));  // where nothing is seen, the sum stays 0
    for (int64_t row = 0; row < count; ++row) {
      const float* from = scores + row * width;
      Lanes sums[2] = {};
      for (int64_t panel = 0; panel < panels; ++panel) {
        Lanes numbers[2];
        for (int half = 0; half < 2; ++half) {
          const int64_t key = panel * kPanel + half * kLanes;
          numbers[half] = exp2_of(load(from + key) * factor - offsets[row]);
          if (panel >= whole) numbers[half] = select(sight.at(query + row, key), numbers[half], Lanes{});
          sums[half] += numbers[half];
        }
        if (kDropout) {
          IntLanes kept[2];
          dropout.keep(query + row, panel, kept);
          for (int half = 0; half < 2; ++half) numbers[half] = select(kept[half], numbers[half], Lanes{});
        }
        Engine::left_row(work.weights + panel * kBlock, first + row, numbers);
      }
      rows[row] = sums[0] + sums[1];
    }
    store(total, reduce(rows, [](auto a, auto b) __attribute__((always_inline)) { return a + b; }));
  }

  static int64_t forward_bytes(const Head& head) {
    Scratch scratch(nullptr);
    const Forward counted(head, scratch);
    return scratch.used();
  }

  static void forward(const Head& head, const HeadOutput& output, char* memory) {
    [[maybe_unused]] const typename Engine::Use use;
    Scratch scratch(memory);
    Forward work(head, scratch);
    const Dropout dropout(head, work.tables);
    work.sight.fill(head);
    const int64_t panels = panels_of(head.rows), depth = panels_of(head.dim);
    pack(head.query, head.stride, head, {{nullptr, work.query, false}});
    pack(head.key, head.stride, head, {{&Engine::right_of_transpose, work.key, false}});
    pack(head.value, head.stride, head, {{&Engine::right, work.value, true}});
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t seen = work.sight.panels(i), rows = within(head.rows, i);
      for (int64_t j = 0; j < seen; ++j)
        Engine::multiply(work.query + i * depth * kBlock, work.key + j * depth * kBlock,
                         {rows, within(head.rows, j), head.dim}, work.scores + j * kPanel, panels * kPanel, false);
      float highest[kPanel], total[kPanel];
      for (int64_t first = 0; first < rows; first += kLanes)
        (head.dropout ? softmax_rows<true> : softmax_rows<false>)(head, dropout, work, i, first, highest + first,
                                                                  total + first);
      for (int64_t j = 0; j < depth; ++j)
        Engine::multiply(work.weights, work.value + j * panels * kBlock,
                         {rows, within(head.dim, j), std::min(head.rows, seen * kPanel)}, work.out + j * kPanel,
                         depth * kPanel, false);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t query = i * kPanel + row;
        const float sum = total[row];
        write_row(work.out + row * depth * kPanel, head.dim, sum == 0 ? 0.f : head.kept / sum,
                  static_cast<Stored*>(output.out) + query * output.stride);
        output.lse[query] = sum == 0 ? -__builtin_inff() : highest[row] * kLn2 + __builtin_logf(sum);
      }
    }
  }

  struct Backward {
    Element *query, *query_across, *key, *key_across, *value_across, *out_grad, *out_grad_across;
    Element *scores_grad, *strip_weights, *strip_scores_grad;
    float *scores, *weights_grad, *query_grad, *key_grad, *value_grad, *lse, *delta;
    Sight sight;
    char* tables;

    Backward(const Head& head, Scratch& scratch) {
      const int64_t panels = panels_of(head.rows), size = panels * panels_of(head.dim) * kBlock;
      for (Element** operand :
           {&query, &query_across, &key, &key_across, &value_across, &out_grad, &out_grad_across})
        *operand = scratch.take<Element>(size);
      scores_grad = scratch.take<Element>(panels * kBlock);
      for (Element** strip : {&strip_weights, &strip_scores_grad})
        *strip = scratch.take<Element>(std::min(panels, kStripPanels) * panels * kBlock);
      for (float** block : {&scores, &weights_grad}) *block = scratch.take<float>(panels * kBlock);
      query_grad = scratch.take<float>(panels_of(head.dim) * kBlock);
      for (float** gradient : {&key_grad, &value_grad}) *gradient = scratch.take<float>(size);
      for (float** rows : {&lse, &delta}) *rows = scratch.take<float>(panels * kPanel);
      sight.visible = scratch.take<int32_t>(panels * kPanel);
      tables = scratch.take<char>(Dropout::bytes(head));
    }
  };

  // P and dS of two queries from S and dP, into left and right blocks.
  template <bool kDropout>
  static void gradient_rows(const Head& head, const Dropout& dropout, const Backward& work, int64_t query_panel,
                            int64_t row, Element* weights, Element* scores_grad, int64_t right_stride) {
    const Sight& sight = work.sight;
    const int64_t query = query_panel * kPanel + row, width = panels_of(head.rows) * kPanel;
    const int64_t panels = sight.panels(query_panel), whole = sight.whole(query_panel);
    const Lanes factor = splat(head.scale * kLog2E);
    const float *scores = work.scores + row * width, *weights_grad = work.weights_grad + row * width;
    for (int64_t panel = 0; panel < panels; ++panel) {
      Lanes kept_weights[2][2], grads[2][2];
      for (int k = 0; k < 2; ++k) {
        IntLanes kept[2];
        if (kDropout) dropout.keep(query + k, panel, kept);
        for (int half = 0; half < 2; ++half) {
          const int64_t key = panel * kPanel + half * kLanes;
          Lanes weight = exp2_of(load(scores + k * width + key) * factor - work.lse[query + k]);
          if (panel >= whole) weight = select(sight.at(query + k, key), weight, Lanes{});
          Lanes grad = load(weights_grad + k * width + key);
          if (kDropout) grad = select(kept[half], grad * head.kept, Lanes{});
          grads[k][half] = weight * (grad - work.delta[query + k]);
          kept_weights[k][half] = kDropout ? select(kept[half], weight, Lanes{}) : weight;
        }
        Engine::left_row(work.scores_grad + panel * kBlock, row + k, grads[k]);
      }
      Engine::right_rows(weights + panel * right_stride, row, kept_weights);
      Engine::right_rows(scores_grad + panel * right_stride, row, grads);
    }
  }

  static int64_t backward_bytes(const Head& head) {
    Scratch scratch(nullptr);
    const Backward counted(head, scratch);
    return scratch.used();
  }

  static void backward(const Head& head, const HeadGradient& gradient, char* memory) {
    [[maybe_unused]] const typename Engine::Use use;
    Scratch scratch(memory);
    Backward work(head, scratch);
    const Dropout dropout(head, work.tables);
    work.sight.fill(head);
    const int64_t panels = panels_of(head.rows), depth = panels_of(head.dim), width = panels * kPanel;
    pack(head.query, head.stride, head,
         {{nullptr, work.query, false}, {&Engine::left_of_transpose, work.query_across, true}});
    pack(head.key, head.stride, head,
         {{&Engine::right_of_transpose, work.key_across, false}, {&Engine::right, work.key, true}});
    pack(head.value, head.stride, head, {{&Engine::right_of_transpose, work.value_across, false}});
    pack(gradient.out_grad, gradient.out_stride, head,
         {{nullptr, work.out_grad, false}, {&Engine::left_of_transpose, work.out_grad_across, true}});
    for (int64_t row = 0; row < width; ++row) {
      // In the padding Q and dO are zero, and any finite weight adds nothing.
      const int64_t at = row * gradient.out_stride;
      Lanes products = {};
      for (int64_t i = 0; i < (row < head.rows ? head.dim : 0); i += kLanes)
        products += load(static_cast<const Stored*>(gradient.out_grad) + at + i) *
                    load(static_cast<const Stored*>(gradient.out) + at + i);
      work.delta[row] = sum(products);
      work.lse[row] = row < head.rows ? gradient.lse[row] * kLog2E : 0.f;
    }
    for (int64_t first = 0; first < panels; first += kStripPanels) {
      const int64_t strip = std::min(kStripPanels, panels - first);
      for (int64_t i = first; i < first + strip; ++i) {
        const int64_t seen = work.sight.panels(i), rows = within(head.rows, i);
        for (int64_t j = 0; j < seen; ++j) {
          const Extent extent{rows, within(head.rows, j), head.dim};
          Engine::multiply(work.query + i * depth * kBlock, work.key_across + j * depth * kBlock, extent,
                           work.scores + j * kPanel, width, false);
          Engine::multiply(work.out_grad + i * depth * kBlock, work.value_across + j * depth * kBlock, extent,
                           work.weights_grad + j * kPanel, width, false);
        }
        for (int64_t row = 0; row < (Engine::kTrims ? rows : kPanel); row += 2)
          (head.dropout ? gradient_rows<true> : gradient_rows<false>)(
              head, dropout, work, i, row, work.strip_weights + (i - first) * kBlock,
              work.strip_scores_grad + (i - first) * kBlock, strip * kBlock);
        for (int64_t j = 0; j < depth; ++j)
          Engine::multiply(work.scores_grad, work.key + j * panels * kBlock,
                           {rows, within(head.dim, j), std::min(head.rows, seen * kPanel)},
                           work.query_grad + j * kPanel, depth * kPanel, false);
        for (int64_t row = 0; row < rows; ++row)
          write_row(work.query_grad + row * depth * kPanel, head.dim, head.scale,
                    static_cast<Stored*>(gradient.query) + (i * kPanel + row) * gradient.stride);
      }
      // Only these queries see key panel j: all, or if causal those from panel j on.
      for (int64_t j = 0; j < (head.causal ? first + strip : panels); ++j) {
        const int64_t skipped = head.causal ? std::max<int64_t>(0, j - first) : 0;
        const bool add = first > 0 && (!head.causal || j < first);
        for (int64_t i = 0; i < depth; ++i) {
          const int64_t left = (i * panels + first + skipped) * kBlock, right = (j * strip + skipped) * kBlock;
          const int64_t to = i * kPanel * width + j * kPanel;
          const int64_t queries = std::min(head.rows, (first + strip) * kPanel) - (first + skipped) * kPanel;
          const Extent extent{within(head.dim, i), within(head.rows, j), queries};
          Engine::multiply(work.out_grad_across + left, work.strip_weights + right, extent, work.value_grad + to, width,
                           add);
          Engine::multiply(work.query_across + left, work.strip_scores_grad + right, extent, work.key_grad + to, width,
                           add);
        }
      }
    }
    write_transposed(work.key_grad, head, head.scale, gradient.key, gradient.stride);
    write_transposed(work.value_grad, head, head.kept, gradient.value, gradient.stride);
  }

  // (dim, padded rows) times `factor` -> (rows, dim) in memory
  static void write_transposed(const float* from, const Head& head, float factor, void* to, int64_t stride) {
    alignas(64) float rows[kLanes * kLanes];
    for (int64_t row = 0; row < head.rows; row += kLanes) {
      for (int64_t i = 0; i < head.dim; i += kLanes) {
        transpose(from + i * panels_of(head.rows) * kPanel + row, panels_of(head.rows) * kPanel, rows, kLanes);
        for (int64_t k = 0; k < std::min<int64_t>(kLanes, head.rows - row); ++k)
          write_row(rows + k * kLanes, kLanes, factor, static_cast<Stored*>(to) + (row + k) * stride + i);
      }
    }
  }

  static int64_t pooled_bytes(const PooledAttention& attention, int64_t rows) {
    return PooledSequence<Stored>::numbers(attention, rows) * sizeof(float);
  }

  static constexpr AttentionKernels kernels(const char* name) {
    return {name,          &forward_bytes, &forward, &backward_bytes, &backward, &pooled_bytes,
            &pooled_forward<Stored>, &pooled_backward<Stored>};
  }
};

}  // namespace
