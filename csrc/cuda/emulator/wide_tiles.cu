// The epilogues of the kernels for Hopper, which the emulator runs after a main loop of its own. It
// has no tensor memory accelerator and no matrix unit of sm_90. The products lie in the same
// threads and registers as there (tests/csrc/test_hopper_layout.py).
#include "csrc/cuda/contrastive/wide_forward.cuh"
#include "csrc/cuda/contrastive/wide_gradient.cuh"

namespace bclip::cuda {
namespace {

constexpr int kDepth = 32;
constexpr int kTextOffset = Tile<Half, kDepth>::bytes(kWideRows);
// Not zero, because the memory of an epilogue starts after other memory in the real kernels.
constexpr int kEpilogueOffset = kTextOffset + Tile<Half, kDepth>::bytes(kWideColumns);

constexpr int kTilesOfBlock = 2;

__host__ __device__ int64_t wide_tiles(const Features& features) {
  return int64_t((features.rows + kWideRows - 1) / kWideRows) *
         ((features.columns + kWideColumns - 1) / kWideColumns);
}

template <class T>
__device__ TilePlace multiply_wide_tile(const Features& features, int64_t tile,
                                        float (&numbers)[WideNumbers::kCount]) {
  const int columns = (features.columns + kWideColumns - 1) / kWideColumns;
  const TilePlace place = wide_place(features, int(tile / columns), int(tile % columns));
  const int width = features.width;
  const T* const image = static_cast<const T*>(features.image) + int64_t(place.row) * width;
  const T* const text = static_cast<const T*>(features.text) + int64_t(place.column) * width;
  const Tile<T, kDepth> rows{{0}}, texts{{kTextOffset}};
  const auto copy = [&](const Tile<T, kDepth>& to, const T* from, int side, int length, int depth) {
    for (int chunk = thread_index(); chunk < side * kDepth / 8; chunk += kWideThreads) {
      const int row = chunk / (kDepth / 8), column = chunk % (kDepth / 8) * 8;
      const bool valid = row < length && depth + column < width;
      copy_async(to.memory, to.index(row, column),
                 valid ? from + int64_t(row) * width + depth + column : from, valid);
    }
  };
  float sums[WideNumbers::kBlocks][4] = {};
  for (int depth = 0; depth < width; depth += kDepth) {
    copy(rows, image, kWideRows, place.rows, depth);
    copy(texts, text, kWideColumns, place.columns, depth);
    commit_copies();
    wait_for_copies<0>();
    block_barrier();
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[4], right[4];
      rows.load_left(left, warp_index() * 16, k);
      for (int block = 0; block < WideNumbers::kBlocks; block += 2) {
        texts.load_right_columns(right, block * 8, k);
        multiply<T>(sums[block], left, right[0], right[1]);
        multiply<T>(sums[block + 1], left, right[2], right[3]);
      }
    }
    block_barrier();
  }
  for (int i = 0; i < WideNumbers::kCount; ++i) numbers[i] = sums[i / 4][i % 4];
  return place;
}

struct ForwardArguments {
  Features features;
  PartialSums sums;
};
struct SoftmaxArguments {
  Features features;
  Normalizers normalizers;
  GradientTile tile;
};
struct SigmoidArguments {
  Features features;
  const float* bias;
  GradientTile tile;
};

// A block of the real kernels computes one tile after another, and no barrier of the main loop is
// between their epilogues. So this one multiplies its tiles first.
template <class T, class Epilogue>
__device__ void run_tiles(const Features& features, Epilogue&& epilogue) {
  float numbers[kTilesOfBlock][WideNumbers::kCount];
  TilePlace places[kTilesOfBlock];
  const int64_t first = block_index() * kTilesOfBlock, left = wide_tiles(features) - first;
  const int count = left < kTilesOfBlock ? int(left) : kTilesOfBlock;
  for (int i = 0; i < count; ++i)
    places[i] = multiply_wide_tile<T>(features, first + i, numbers[i]);
  for (int i = 0; i < count; ++i) epilogue(numbers[i], places[i]);
}

template <class T>
__global__ void forward(ForwardArguments arguments) {
  run_tiles<T>(arguments.features, [&](auto& numbers, const TilePlace& place) {
    wide_forward(numbers, arguments.features, arguments.sums, place, thread_index(),
                 kEpilogueOffset);
  });
}
template <class T>
__global__ void softmax(SoftmaxArguments arguments) {
  run_tiles<T>(arguments.features, [&](auto& numbers, const TilePlace& place) {
    wide_softmax(numbers, arguments.features, arguments.normalizers, arguments.tile, place,
                 thread_index(), kEpilogueOffset);
  });
}
template <class T>
__global__ void sigmoid(SigmoidArguments arguments) {
  run_tiles<T>(arguments.features, [&](auto& numbers, const TilePlace& place) {
    wide_sigmoid(numbers, arguments.features, arguments.bias, arguments.tile, place, thread_index(),
                 kEpilogueOffset);
  });
}

template <class Arguments>
void launch_tiles(void (*half)(Arguments), void (*bfloat16)(Arguments), int bytes,
                  const Arguments& arguments) {
  const Features& features = arguments.features;
  launch(features.bfloat16 ? bfloat16 : half,
         {(wide_tiles(features) + kTilesOfBlock - 1) / kTilesOfBlock, kWideThreads,
          kEpilogueOffset + bytes, features.stream},
         arguments);
}

}  // namespace

int hopper_forward_bytes() { return kEpilogueOffset + kWideForwardBytes; }
int hopper_gradient_bytes() { return kEpilogueOffset + kWideGradientBytes; }

void hopper_forward(const Features& features, const PartialSums& sums) {
  launch_tiles(forward<Half>, forward<Bfloat16>, kWideForwardBytes,
               ForwardArguments{features, sums});
}
void hopper_softmax(const Features& features, const Normalizers& normalizers,
                    const GradientTile& tile) {
  launch_tiles(softmax<Half>, softmax<Bfloat16>, kWideGradientBytes,
               SoftmaxArguments{features, normalizers, tile});
}
void hopper_sigmoid(const Features& features, const float* bias, const GradientTile& tile) {
  launch_tiles(sigmoid<Half>, sigmoid<Bfloat16>, kWideGradientBytes,
               SigmoidArguments{features, bias, tile});
}

}  // namespace bclip::cuda
