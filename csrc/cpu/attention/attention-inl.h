// The attention kernels, for an engine that multiplies matrices and a type in memory.
//
// Matrices consist of blocks of 32 x 32, padded with zeros. A left operand (M, K) is [M / 32][K /
// 32][block], and a right operand (K, N) is [N / 32][K / 32][block]. The engine chooses the layout
// inside a block. All scores of a query are in memory at once, so the softmax needs no running
// maximum. P is made in the layout that the next product reads. The backward pass also packs P and
// dS as right operands while they are in registers. So dV^T = dO^T P and dK^T = Q^T dS transpose no
// (n, n) matrix.
#pragma once

#include "csrc/cpu/attention/attention_kernels.h"
#include "csrc/cpu/attention/blocks-inl.h"
#include "csrc/cpu/attention/dropout-inl.h"
#include "csrc/cpu/attention/float_engine-inl.h"
#include "csrc/cpu/attention/single_query_attention-inl.h"
#include "csrc/cpu/simd/bf16.h"
#include "csrc/cpu/simd/math.h"
#include "csrc/cpu/simd/transpose.h"

namespace bclip::cpu::BCLIP_ISA {

namespace {

// The number of query panels in a strip. Their P and dS for 256 keys stay in L2.
constexpr int64_t kStripPanels = 8;

template <class Engine, class Stored>
struct HeadKernels {
  using Element = typename Engine::Element;
  using Put = void (*)(const Element* block, Element* to);

  // A way to pack a matrix (rows, dim), or its transpose, into blocks.
  struct Packing {
    Put put;  // null for a left operand, whose blocks are copied as they are
    Element* to;
    bool by_dim;  // panels are along dim and steps along the rows
  };

  static void pack(const void* matrix, int64_t stride, const Head& head,
                   std::initializer_list<Packing> packings) {
    const int64_t row_panels = panels_of(head.rows), dim_panels = panels_of(head.dim);
    alignas(64) Element block[kBlock];
    for (int64_t i = 0; i < row_panels; ++i) {
      for (int64_t j = 0; j < dim_panels; ++j) {
        const Stored* from = static_cast<const Stored*>(matrix) + i * kPanel * stride + j * kPanel;
        Engine::load_rows(from, stride, head.rows - i * kPanel, head.dim - j * kPanel, block);
        for (const Packing& packing : packings) {
          Element* to =
              packing.to + (packing.by_dim ? j * row_panels + i : i * dim_panels + j) * kBlock;
          if (packing.put)
            packing.put(block, to);
          else
            std::memcpy(to, block, sizeof block);
        }
      }
    }
  }

  // Writes a row of numbers times `factor` to memory.
  static void write_row(const float* from, int64_t dim, float factor, Stored* to) {
    for (int64_t i = 0; i < dim; i += kLanes) Store(to + i, Load(from + i) * factor);
  }

  // The keys that a query may attend to.
  struct Sight {
    int32_t* visible;  // -1 or 0 for each key, and 0 in the padding
    bool masked, causal;
    int64_t rows;

    void fill(const Head& head) {
      masked = head.key_mask != nullptr;
      causal = head.causal;
      rows = head.rows;
      for (int64_t key = 0; key < panels_of(rows) * kPanel; ++key)
        visible[key] = key < rows && (!masked || head.key_mask[key]) ? -1 : 0;
    }

    // panels() counts the key panels that at least one query of the panel sees. whole() counts the
    // key panels at the start in which every query sees every key.
    int64_t panels(int64_t query_panel) const { return causal ? query_panel + 1 : panels_of(rows); }
    int64_t whole(int64_t query_panel) const {
      return masked ? 0 : causal ? query_panel : rows / kPanel;
    }

    BCLIP_MEMBER_INLINE IntLanes at(int64_t row, int64_t key) const {
      const IntLanes seen = LoadAs<IntLanes>(visible + key);
      return causal ? seen & (Iota() <= static_cast<int32_t>(row - key)) : seen;
    }
  };

  struct Forward {
    Element *query, *key, *value, *weights;
    float *scores, *out;
    Sight sight;
    char* tables;

    Forward(const Head& head, Arena& arena) {
      const int64_t panels = panels_of(head.rows), size = panels * panels_of(head.dim) * kBlock;
      query = arena.take<Element>(size);
      key = arena.take<Element>(size);
      value = arena.take<Element>(size);
      weights = arena.take<Element>(panels * kBlock);
      scores = arena.take<float>(panels * kBlock);
      out = arena.take<float>(panels_of(head.dim) * kBlock);
      sight.visible = arena.take<int32_t>(panels * kPanel);
      tables = arena.take<char>(HeadDropout::bytes(head));
    }
  };

  // Writes the weights of 16 queries into left blocks, before the division by their sum: 2^(score -
  // highest score of the query).
  template <bool kDropout>
  static void softmax_rows(const Head& head, const HeadDropout& dropout, const Forward& work,
                           int64_t query_panel, int64_t first, float* highest, float* total) {
    const Lanes nothing = Set(-__builtin_inff());
    const Sight& sight = work.sight;
    const int64_t width = panels_of(head.rows) * kPanel, query = query_panel * kPanel + first;
    const int64_t panels = sight.panels(query_panel), whole = sight.whole(query_panel);
    const int64_t count = std::min<int64_t>(kLanes, head.rows - query);
    const float* scores = work.scores + first * width;
    const Lanes factor = Set(head.scale * kLog2E);
    Lanes rows[kLanes] = {};
    for (int64_t row = 0; row < count; ++row) {
      const float* from = scores + row * width;
      Lanes tops[2] = {nothing, nothing};
      for (int64_t key = 0; key < whole * kPanel; key += kPanel)
        for (int half = 0; half < 2; ++half)
          tops[half] = Max(Load(from + key + half * kLanes) * factor, tops[half]);
      for (int64_t key = whole * kPanel; key < panels * kPanel; key += kLanes)
        tops[0] = Max(IfThenElse(sight.at(query + row, key), Load(from + key) * factor, nothing),
                      tops[0]);
      rows[row] = Max(tops[0], tops[1]);
    }
    const Lanes top = reduce_rows(rows, [](auto a, auto b) __attribute__((always_inline)) {
      return IfThenElse(a > b, a, b);
    });
    Store(highest, top);
    float offsets[kLanes];
    // A query that sees no key keeps the sum 0.
    Store(offsets, IfThenElse(top == nothing, Lanes{}, top));
    for (int64_t row = 0; row < count; ++row) {
      const float* from = scores + row * width;
      Lanes sums[2] = {};
      for (int64_t panel = 0; panel < panels; ++panel) {
        Lanes numbers[2];
        for (int half = 0; half < 2; ++half) {
          const int64_t key = panel * kPanel + half * kLanes;
          numbers[half] = Exp2(Load(from + key) * factor - offsets[row]);
          if (panel >= whole)
            numbers[half] = IfThenElse(sight.at(query + row, key), numbers[half], Lanes{});
          sums[half] += numbers[half];
        }
        if (kDropout) {
          IntLanes kept[2];
          dropout.keep(query + row, panel, kept);
          for (int half = 0; half < 2; ++half)
            numbers[half] = IfThenElse(kept[half], numbers[half], Lanes{});
        }
        Engine::left_row(work.weights + panel * kBlock, first + row, numbers);
      }
      rows[row] = sums[0] + sums[1];
    }
    Store(total,
          reduce_rows(rows, [](auto a, auto b) __attribute__((always_inline)) { return a + b; }));
  }

  static int64_t forward_bytes(const Head& head) {
    Arena arena(nullptr);
    const Forward counted(head, arena);
    return arena.used();
  }

  static void forward(const Head& head, const HeadOutput& output, char* memory) {
    [[maybe_unused]] const typename Engine::Session session;
    Arena arena(memory);
    Forward work(head, arena);
    const HeadDropout dropout(head, work.tables);
    work.sight.fill(head);
    const int64_t panels = panels_of(head.rows), depth = panels_of(head.dim);
    pack(head.query, head.stride, head, {{nullptr, work.query, false}});
    pack(head.key, head.stride, head, {{&Engine::right_of_transpose, work.key, false}});
    pack(head.value, head.stride, head, {{&Engine::right, work.value, true}});
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t seen = work.sight.panels(i), rows = within(head.rows, i);
      for (int64_t j = 0; j < seen; ++j)
        Engine::multiply(work.query + i * depth * kBlock, work.key + j * depth * kBlock,
                         {rows, within(head.rows, j), head.dim}, work.scores + j * kPanel,
                         panels * kPanel, false);
      float highest[kPanel], total[kPanel];
      for (int64_t first = 0; first < rows; first += kLanes)
        (head.dropout ? softmax_rows<true> : softmax_rows<false>)(head, dropout, work, i, first,
                                                                  highest + first, total + first);
      for (int64_t j = 0; j < depth; ++j)
        Engine::multiply(work.weights, work.value + j * panels * kBlock,
                         {rows, within(head.dim, j), std::min(head.rows, seen * kPanel)},
                         work.out + j * kPanel, depth * kPanel, false);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t query = i * kPanel + row;
        const float sum = total[row];
        write_row(work.out + row * depth * kPanel, head.dim, sum == 0 ? 0.f : head.kept / sum,
                  static_cast<Stored*>(output.out) + query * output.stride);
        output.lse[query] =
            sum == 0 ? -__builtin_inff() : highest[row] * kLn2 + __builtin_logf(sum);
      }
    }
  }

  struct Backward {
    Element *query, *query_across, *key, *key_across, *value_across, *out_grad, *out_grad_across;
    Element *scores_grad, *strip_weights, *strip_scores_grad;
    float *scores, *weights_grad, *query_grad, *key_grad, *value_grad, *lse, *delta;
    Sight sight;
    char* tables;

    Backward(const Head& head, Arena& arena) {
      const int64_t panels = panels_of(head.rows), size = panels * panels_of(head.dim) * kBlock;
      for (Element** operand :
           {&query, &query_across, &key, &key_across, &value_across, &out_grad, &out_grad_across})
        *operand = arena.take<Element>(size);
      scores_grad = arena.take<Element>(panels * kBlock);
      for (Element** strip : {&strip_weights, &strip_scores_grad})
        *strip = arena.take<Element>(std::min(panels, kStripPanels) * panels * kBlock);
      for (float** block : {&scores, &weights_grad}) *block = arena.take<float>(panels * kBlock);
      query_grad = arena.take<float>(panels_of(head.dim) * kBlock);
      for (float** gradient : {&key_grad, &value_grad}) *gradient = arena.take<float>(size);
      for (float** rows : {&lse, &delta}) *rows = arena.take<float>(panels * kPanel);
      sight.visible = arena.take<int32_t>(panels * kPanel);
      tables = arena.take<char>(HeadDropout::bytes(head));
    }
  };

  // Computes P and dS of two queries from S and dP, and writes them into left and right blocks.
  template <bool kDropout>
  static void gradient_rows(const Head& head, const HeadDropout& dropout, const Backward& work,
                            int64_t query_panel, int64_t row, Element* weights,
                            Element* scores_grad, int64_t right_stride) {
    const Sight& sight = work.sight;
    const int64_t query = query_panel * kPanel + row, width = panels_of(head.rows) * kPanel;
    const int64_t panels = sight.panels(query_panel), whole = sight.whole(query_panel);
    const Lanes factor = Set(head.scale * kLog2E);
    const float *scores = work.scores + row * width,
                *weights_grad = work.weights_grad + row * width;
    for (int64_t panel = 0; panel < panels; ++panel) {
      Lanes kept_weights[2][2], grads[2][2];
      for (int k = 0; k < 2; ++k) {
        IntLanes kept[2];
        if (kDropout) dropout.keep(query + k, panel, kept);
        for (int half = 0; half < 2; ++half) {
          const int64_t key = panel * kPanel + half * kLanes;
          Lanes weight = Exp2(Load(scores + k * width + key) * factor - work.lse[query + k]);
          if (panel >= whole) weight = IfThenElse(sight.at(query + k, key), weight, Lanes{});
          Lanes grad = Load(weights_grad + k * width + key);
          if (kDropout) grad = IfThenElse(kept[half], grad * head.kept, Lanes{});
          grads[k][half] = weight * (grad - work.delta[query + k]);
          kept_weights[k][half] = kDropout ? IfThenElse(kept[half], weight, Lanes{}) : weight;
        }
        Engine::left_row(work.scores_grad + panel * kBlock, row + k, grads[k]);
      }
      Engine::right_rows(weights + panel * right_stride, row, kept_weights);
      Engine::right_rows(scores_grad + panel * right_stride, row, grads);
    }
  }

  static int64_t backward_bytes(const Head& head) {
    Arena arena(nullptr);
    const Backward counted(head, arena);
    return arena.used();
  }

  static void backward(const Head& head, const HeadGradient& gradient, char* memory) {
    [[maybe_unused]] const typename Engine::Session session;
    Arena arena(memory);
    Backward work(head, arena);
    const HeadDropout dropout(head, work.tables);
    work.sight.fill(head);
    const int64_t panels = panels_of(head.rows), depth = panels_of(head.dim),
                  width = panels * kPanel;
    pack(head.query, head.stride, head,
         {{nullptr, work.query, false}, {&Engine::left_of_transpose, work.query_across, true}});
    pack(head.key, head.stride, head,
         {{&Engine::right_of_transpose, work.key_across, false}, {&Engine::right, work.key, true}});
    pack(head.value, head.stride, head, {{&Engine::right_of_transpose, work.value_across, false}});
    pack(gradient.out_grad, gradient.out_stride, head,
         {{nullptr, work.out_grad, false},
          {&Engine::left_of_transpose, work.out_grad_across, true}});
    for (int64_t row = 0; row < width; ++row) {
      // Q and dO are zero in the padding, so any finite weight adds nothing there.
      const int64_t at = row * gradient.out_stride;
      Lanes products = {};
      for (int64_t i = 0; i < (row < head.rows ? head.dim : 0); i += kLanes)
        products += Load(static_cast<const Stored*>(gradient.out_grad) + at + i) *
                    Load(static_cast<const Stored*>(gradient.out) + at + i);
      work.delta[row] = ReduceSum(products);
      work.lse[row] = row < head.rows ? gradient.lse[row] * kLog2E : 0.f;
    }
    for (int64_t first = 0; first < panels; first += kStripPanels) {
      const int64_t strip = std::min(kStripPanels, panels - first);
      for (int64_t i = first; i < first + strip; ++i) {
        const int64_t seen = work.sight.panels(i), rows = within(head.rows, i);
        for (int64_t j = 0; j < seen; ++j) {
          const Extent extent{rows, within(head.rows, j), head.dim};
          Engine::multiply(work.query + i * depth * kBlock, work.key_across + j * depth * kBlock,
                           extent, work.scores + j * kPanel, width, false);
          Engine::multiply(work.out_grad + i * depth * kBlock,
                           work.value_across + j * depth * kBlock, extent,
                           work.weights_grad + j * kPanel, width, false);
        }
        for (int64_t row = 0; row < (Engine::kTrims ? rows : kPanel); row += 2)
          (head.dropout ? gradient_rows<true>
                        : gradient_rows<false>)(head, dropout, work, i, row,
                                                work.strip_weights + (i - first) * kBlock,
                                                work.strip_scores_grad + (i - first) * kBlock,
                                                strip * kBlock);
        for (int64_t j = 0; j < depth; ++j)
          Engine::multiply(work.scores_grad, work.key + j * panels * kBlock,
                           {rows, within(head.dim, j), std::min(head.rows, seen * kPanel)},
                           work.query_grad + j * kPanel, depth * kPanel, false);
        for (int64_t row = 0; row < rows; ++row)
          write_row(work.query_grad + row * depth * kPanel, head.dim, head.scale,
                    static_cast<Stored*>(gradient.query) + (i * kPanel + row) * gradient.stride);
      }
      // The queries of the strip that see key panel j: all of them, or with a causal mask those
      // from panel j on.
      for (int64_t j = 0; j < (head.causal ? first + strip : panels); ++j) {
        const int64_t skipped = head.causal ? std::max<int64_t>(0, j - first) : 0;
        const bool add = first > 0 && (!head.causal || j < first);
        for (int64_t i = 0; i < depth; ++i) {
          const int64_t left = (i * panels + first + skipped) * kBlock,
                        right = (j * strip + skipped) * kBlock;
          const int64_t to = i * kPanel * width + j * kPanel;
          const int64_t queries =
              std::min(head.rows, (first + strip) * kPanel) - (first + skipped) * kPanel;
          const Extent extent{within(head.dim, i), within(head.rows, j), queries};
          Engine::multiply(work.out_grad_across + left, work.strip_weights + right, extent,
                           work.value_grad + to, width, add);
          Engine::multiply(work.query_across + left, work.strip_scores_grad + right, extent,
                           work.key_grad + to, width, add);
        }
      }
    }
    write_transposed(work.key_grad, head, head.scale, gradient.key, gradient.stride);
    write_transposed(work.value_grad, head, head.kept, gradient.value, gradient.stride);
  }

  // Writes (dim, padded rows) times `factor` as (rows, dim) to memory.
  static void write_transposed(const float* from, const Head& head, float factor, void* to,
                               int64_t stride) {
    alignas(64) float rows[kLanes * kLanes];
    for (int64_t row = 0; row < head.rows; row += kLanes) {
      for (int64_t i = 0; i < head.dim; i += kLanes) {
        transpose(from + i * panels_of(head.rows) * kPanel + row, panels_of(head.rows) * kPanel,
                  rows, kLanes);
        for (int64_t k = 0; k < std::min<int64_t>(kLanes, head.rows - row); ++k)
          write_row(rows + k * kLanes, kLanes, factor,
                    static_cast<Stored*>(to) + (row + k) * stride + i);
      }
    }
  }

  static int64_t single_query_bytes(const SingleQueryAttention& attention, int64_t rows) {
    return SingleQuery<Stored>::numbers(attention, rows) * sizeof(float);
  }

  static constexpr AttentionKernels kernels() {
    return {&forward_bytes,
            &forward,
            &backward_bytes,
            &backward,
            &single_query_bytes,
            &single_query_forward<Stored>,
            &single_query_backward<Stored>};
  }
};

}  // namespace

}  // namespace bclip::cpu::BCLIP_ISA
