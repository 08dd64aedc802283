// Strips of X from the matrix unit, 64 rows of 512 columns, go through the kernels of contrastive_tile.h while they are
// in L2. G is rounded to bfloat16 and packed twice: as left operand of G T and as right operand of I^T G, which spares
// its transposition.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../contrastive.h"
#include "contrastive_kernels.h"
#include "parallel.h"

#if defined(BCLIP_X86_TARGETS) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics start from an undefined vector
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")

namespace bclip::cpu {

namespace {

constexpr int64_t kPanel = 32;
constexpr int64_t kHalf = 16;
constexpr int64_t kStep = kPanel * kPanel;  // elements of a panel per 32 k
constexpr int64_t kStripRows = 64;
constexpr int64_t kStepsAtOnce = 16;  // 512 k of a panel are 32 KiB: they stay in L1
constexpr int64_t kGroupPanels = 8;   // panels of G, 256 KiB for 512 k, that stay in L2

int64_t panels(int64_t size) { return (size + kPanel - 1) / kPanel; }

// Tiles 0-3 hold results, 4 and 5 the left operand, 6 and 7 the right one; all are 16 rows of 64 bytes.
struct TileUse {
  TileUse() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileUse() { _tile_release(); }
};

// result (32, 32), rows `stride` floats apart, = or += left (32, 32 steps) right (32 steps, 32).
inline void multiply(const uint16_t* left, const uint16_t* right, int64_t steps, float* result, int64_t stride,
                     bool add) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  if (add) {
    _tile_loadd(0, result, bytes);
    _tile_loadd(1, result + kHalf, bytes);
    _tile_loadd(2, result + kHalf * stride, bytes);
    _tile_loadd(3, result + kHalf * stride + kHalf, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, left += kStep, right += kStep) {
    _tile_loadd(6, right, 64);
    _tile_loadd(4, left, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kStep / 2, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + kStep / 2, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, result, bytes);
  _tile_stored(1, result + kHalf, bytes);
  _tile_stored(2, result + kHalf * stride, bytes);
  _tile_stored(3, result + kHalf * stride + kHalf, bytes);
}

// Element (i, k) of the matrix is at from[i * stride + k * stride_k].
void pack_left(const uint16_t* from, int64_t stride, int64_t stride_k, int64_t rows, int64_t depth, int64_t panel,
               uint16_t* packed) {
  const int64_t steps = panels(depth);
  packed += panel * steps * kStep;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t count = std::min(kPanel, depth - step * kPanel);
    for (int64_t i = 0; i < kPanel; ++i, packed += kPanel) {
      const int64_t row = panel * kPanel + i;
      const uint16_t* source = from + row * stride + step * kPanel * stride_k;
      if (row >= rows) {
        std::memset(packed, 0, kPanel * sizeof *packed);
      } else if (stride_k == 1 && count == kPanel) {
        std::memcpy(packed, source, kPanel * sizeof *packed);
      } else {
        for (int64_t k = 0; k < kPanel; ++k) packed[k] = k < count ? source[k * stride_k] : 0;
      }
    }
  }
}

// Element (k, j) of the matrix is at from[j * stride + k * stride_k].
void pack_right(const uint16_t* from, int64_t stride, int64_t stride_k, int64_t columns, int64_t depth, int64_t panel,
                uint16_t* packed) {
  const int64_t steps = panels(depth);
  packed += panel * steps * kStep;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = panel * kPanel + half * kHalf;
      const uint16_t* source = from + column * stride + step * kPanel * stride_k;
      for (int64_t k = 0; k < kPanel; k += 2, packed += kPanel) {
        const bool has_first = step * kPanel + k < depth, has_second = step * kPanel + k + 1 < depth;
        for (int64_t j = 0; j < kHalf; ++j) {
          const bool inside = column + j < columns;
          const uint16_t* pair = source + j * stride + k * stride_k;
          packed[2 * j] = inside && has_first ? pair[0] : 0;
          packed[2 * j + 1] = inside && has_second ? pair[stride_k] : 0;
        }
      }
    }
  }
}

struct Buffer {
  explicit Buffer(int64_t count) : memory(new (std::align_val_t(64)) uint16_t[count]) {}
  ~Buffer() { ::operator delete[](memory, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint16_t* const memory;
};

int64_t num_tiles(const AmxBlock& block) { return (block.columns + kTileColumns - 1) / kTileColumns; }

// Runs use(tile, row of the block where it starts, number of the tile) on every strip; a thread does whole tile columns.
void for_strips(const AmxBlock& block, const uint16_t* image, int threads,
                const std::function<void(const Tile&, int64_t, int64_t)>& use,
                const std::function<void(int64_t)>& finish) {
  const int64_t steps = panels(block.width);
  parallel(num_tiles(block), threads, [&](int64_t index) {
    const TileUse tiles;
    alignas(64) float strip[kStripRows * kTileColumns];
    const int64_t start = index * kTileColumns;
    const int64_t columns = std::min(kTileColumns, block.columns - start);
    const uint16_t* texts = block.text_across + start / kPanel * steps * kStep;
    for (int64_t row = 0; row < block.rows; row += kStripRows) {
      const int64_t rows = std::min(kStripRows, block.rows - row);
      for (int64_t i = 0; i < panels(rows); ++i) {
        const uint16_t* left = image + (row / kPanel + i) * steps * kStep;
        for (int64_t j = 0; j < panels(columns); ++j)
          multiply(left, texts + j * steps * kStep, steps, strip + i * kPanel * kTileColumns + j * kPanel,
                   kTileColumns, false);
      }
      use({strip, kTileColumns, rows, columns, block.first + row - start}, row, index);
    }
    finish(index);
  });
}

// Rounds a strip of G and packs it: from the left into rows of panels with `left_steps`, from the right into `right`.
void pack_gradient(const float* strip, int64_t row_panels, int64_t column_panels, uint16_t* left, int64_t left_steps,
                   uint16_t* right, int64_t right_steps) {
  for (int64_t i = 0; i < row_panels; ++i) {
    for (int64_t j = 0; j < column_panels; ++j) {
      const float* from = strip + i * kPanel * kTileColumns + j * kPanel;
      uint16_t* to_left = left + (i * left_steps + j) * kStep;
      uint16_t* to_right = right + (j * right_steps + i) * kStep;
      for (int64_t row = 0; row < kPanel; row += 2) {
        __m512i rounded[2];  // 32 columns of bfloat16
        for (int64_t k = 0; k < 2; ++k) {
          const float* source = from + (row + k) * kTileColumns;
          rounded[k] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(source + kHalf), _mm512_loadu_ps(source));
          _mm512_storeu_si512(to_left + (row + k) * kPanel, rounded[k]);
        }
        const auto pairs = [&](__m256i even, __m256i odd) {
          return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
        };
        _mm512_storeu_si512(to_right + row * kHalf, pairs(_mm512_castsi512_si256(rounded[0]),
                                                          _mm512_castsi512_si256(rounded[1])));
        _mm512_storeu_si512(to_right + kStep / 2 + row * kHalf, pairs(_mm512_extracti64x4_epi64(rounded[0], 1),
                                                                      _mm512_extracti64x4_epi64(rounded[1], 1)));
      }
    }
  }
}

// Packs I; with gradients, fills G by `write_gradient` strip by strip, and multiplies it by I and T.
void gradients_of(const AmxBlock& block, const AmxGradients* gradients, int threads,
                  const std::function<void(const Tile&, int64_t, int64_t)>& write_gradient) {
  const int64_t row_panels = panels(block.rows), column_panels = panels(block.columns), steps = panels(block.width);
  const Buffer image(row_panels * steps * kStep);
  parallel(row_panels, threads, [&](int64_t panel) {
    pack_left(block.image, block.width, 1, block.rows, block.width, panel, image.memory);
  });
  if (!gradients) return for_strips(block, image.memory, threads, write_gradient, [](int64_t) {});

  const Buffer image_across(row_panels * steps * kStep);
  parallel(steps, threads, [&](int64_t panel) {
    pack_left(block.image, 1, block.width, block.width, block.rows, panel, image_across.memory);
  });
  uint16_t* left = gradients->workspace;
  uint16_t* right = left + row_panels * column_panels * kStep;
  const auto use = [&](const Tile& tile, int64_t row, int64_t index) {
    write_gradient(tile, row, index);
    const int64_t row_panel = row / kPanel, column_panel = index * kTileColumns / kPanel;
    pack_gradient(tile.dots, panels(tile.rows), panels(tile.columns),
                  left + (row_panel * column_panels + column_panel) * kStep, column_panels,
                  right + (column_panel * row_panels + row_panel) * kStep, row_panels);
  };
  const auto add_to_text = [&](int64_t index) {
    const int64_t begin = index * kTileColumns / kPanel;
    const int64_t end = std::min(begin + kTileColumns / kPanel, column_panels);
    for (int64_t step = 0; step < row_panels; step += kStepsAtOnce)
      for (int64_t j = begin; j < end; ++j)
        for (int64_t i = 0; i < steps; ++i)
          multiply(image_across.memory + (i * row_panels + step) * kStep, right + (j * row_panels + step) * kStep,
                   std::min(kStepsAtOnce, row_panels - step), gradients->text_gradient + (j * steps + i) * kStep,
                   kPanel, true);
  };
  for_strips(block, image.memory, threads, use, add_to_text);

  const int64_t row_groups = (row_panels + kGroupPanels - 1) / kGroupPanels;
  const int64_t width_groups = (steps + kGroupPanels - 1) / kGroupPanels;
  parallel(row_groups * width_groups, threads, [&](int64_t index) {
    const TileUse tiles;
    const int64_t row_begin = index / width_groups * kGroupPanels, width_begin = index % width_groups * kGroupPanels;
    const int64_t row_end = std::min(row_begin + kGroupPanels, row_panels);
    const int64_t width_end = std::min(width_begin + kGroupPanels, steps);
    for (int64_t step = 0; step < column_panels; step += kStepsAtOnce)
      for (int64_t j = width_begin; j < width_end; ++j)
        for (int64_t i = row_begin; i < row_end; ++i)
          multiply(left + (i * column_panels + step) * kStep, gradients->text + (j * column_panels + step) * kStep,
                   std::min(kStepsAtOnce, column_panels - step),
                   gradients->image_gradient + (j * row_panels + i) * kStep, kPanel, step > 0);
  });
}

bool ask_for_amx() {
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (amx_bf16 | amx_tile)) != (amx_bf16 | amx_tile)) return false;
  if (!__builtin_cpu_supports("avx512bf16") || instruction_set() != "avx512") return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

void check(const AmxBlock& block) {
  if (!has_amx()) throw std::invalid_argument("contrastive: this machine has no AMX, or Linux denies it");
  if (block.rows < 0 || block.columns < 0 || block.width < 0)
    throw std::invalid_argument("contrastive: a block has negative sizes");
}

}  // namespace

bool has_amx() {
  static const bool granted = ask_for_amx();
  return granted;
}

void amx_pack(const uint16_t* matrix, int64_t rows, int64_t columns, bool transpose, uint16_t* packed, int threads) {
  parallel(panels(transpose ? rows : columns), threads, [&](int64_t panel) {
    if (transpose)
      pack_right(matrix, columns, 1, rows, columns, panel, packed);
    else
      pack_right(matrix, 1, columns, columns, rows, panel, packed);
  });
}

void amx_exponential_sums(const AmxBlock& block, double factor, float offset, const Sums& sums, int threads) {
  check(block);
  std::vector<float> partial(num_tiles(block) * block.rows);
  gradients_of(block, nullptr, threads, [&](const Tile& tile, int64_t row, int64_t index) {
    kAvx512Kernels.exponential_sums(tile, factor, offset, partial.data() + index * block.rows + row,
                                    sums.columns + index * kTileColumns);
  });
  for (int64_t row = 0; row < block.rows; ++row) {
    double total = 0;
    for (int64_t index = 0; index < num_tiles(block); ++index) total += partial[index * block.rows + row];
    sums.rows[row] = static_cast<float>(total);
  }
}

void amx_softmax_gradient(const AmxBlock& block, const Softmax& softmax, const AmxGradients& gradients, int threads) {
  check(block);
  const SoftmaxShares shares(softmax, block.rows, block.columns);
  gradients_of(block, &gradients, threads, [&](const Tile& tile, int64_t row, int64_t index) {
    kAvx512Kernels.softmax_gradient(tile, shares.tile(row, index * kTileColumns));
  });
}

SigmoidSums amx_sigmoid_gradient(const AmxBlock& block, const Sigmoid& sigmoid, const AmxGradients& gradients,
                                 int threads) {
  check(block);
  std::vector<SigmoidTileSums> partial(num_tiles(block));
  gradients_of(block, sigmoid.with_gradients ? &gradients : nullptr, threads,
               [&](const Tile& tile, int64_t row, int64_t index) {
                 const SigmoidTile constants(sigmoid, row, index * kTileColumns);
                 const auto sums = kAvx512Kernels.sigmoid_gradient(tile, constants);
                 partial[index].loss += sums.loss;
                 partial[index].gradient += sums.gradient;
               });
  SigmoidSums total = {};
  for (const auto& part : partial) {
    total.loss += part.loss;
    total.gradient += part.gradient;
  }
  return total;
}

}  // namespace bclip::cpu

#else

namespace bclip::cpu {

namespace {

[[noreturn]] void refuse() { throw std::invalid_argument("contrastive: built without AMX"); }

}  // namespace

bool has_amx() { return false; }

void amx_pack(const uint16_t*, int64_t, int64_t, bool, uint16_t*, int) { refuse(); }

void amx_exponential_sums(const AmxBlock&, float, float, const Sums&, int) { refuse(); }

void amx_softmax_gradient(const AmxBlock&, const Softmax&, const AmxGradients&, int) { refuse(); }

SigmoidSums amx_sigmoid_gradient(const AmxBlock&, const Sigmoid&, const AmxGradients&, int) { refuse(); }

}  // namespace bclip::cpu

#endif
