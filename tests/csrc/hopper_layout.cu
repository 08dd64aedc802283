// Prints, for each thread and number of a tile of the Hopper kernels, its row and column as CUTLASS
// places it and as csrc/cuda/contrastive/wide_tile.cuh takes it. It runs on the host.
#include <cstdio>

#include <cutlass/numeric_types.h>

#include "csrc/cuda/contrastive/hopper_layout.cuh"
#include "csrc/cuda/contrastive/wide_tile.cuh"

namespace {

template <class Element>
void print(const char* name) {
  using namespace bclip::cuda;
  const HopperMma<Element> mma;
  const auto tile = cute::make_identity_tensor(
      cute::make_shape(cute::Int<kWideRows>{}, cute::Int<kWideColumns>{}));
  const auto fragment = cute::partition_fragment_C(
      mma, cute::make_shape(cute::Int<kWideRows>{}, cute::Int<kWideColumns>{}));
  static_assert(cute::size(HopperMma<Element>{}) == kWideThreads);
  static_assert(cute::size(decltype(fragment.layout()){}) == WideNumbers::kCount);
  for (int thread = 0; thread < kWideThreads; ++thread) {
    const auto places = mma.get_slice(thread).partition_C(tile);
    for (int block = 0; block < WideNumbers::kBlocks; ++block) {
      for (int half = 0; half < 2; ++half) {
        for (int odd = 0; odd < 2; ++odd) {
          const int index = WideNumbers::index_of(block, half, odd);
          std::printf("%s %d %d %d %d %d %d\n", name, thread, index,
                      int(cute::get<0>(places(index))), int(cute::get<1>(places(index))),
                      WideNumbers::row_of(thread, half),
                      WideNumbers::column_of(thread, block, odd));
        }
      }
    }
  }
}

}  // namespace

int main() {
  print<cutlass::half_t>("float16");
  print<cutlass::bfloat16_t>("bfloat16");
}
