// The kernels of hopper.h: CUTLASS's persistent cooperative kernel for sm_90a with its main loop,
// and an epilogue that calls ours. Only files that are compiled with BCLIP_CUTLASS include this
// header.
#pragma once

#include <stdexcept>
#include <string>

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "csrc/cuda/contrastive/hopper_layout.cuh"
#include "csrc/cuda/contrastive/wide_tile.cuh"

namespace bclip::cuda {

static_assert(kWideBarrier >= int(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier));

// An epilogue as CUTLASS calls it. `Work` gives the arguments, the size of the shared memory and
// the epilogue of a tile.
template <class Work>
class HopperEpilogue {
 public:
  // CUTLASS asks for these. There is no C and no D: our epilogue stores by itself.
  using EpilogueSchedule = cutlass::epilogue::NoSmemWarpSpecialized;
  using DispatchPolicy = EpilogueSchedule;
  struct ThreadEpilogueOp {
    using ElementOutput = float;
    using ElementAccumulator = float;
    using ElementCompute = float;
    using ElementD = float;
    static constexpr int kCount = 1;
  };
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementC = float;
  using ElementD = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;

  // The operands come after this memory. Their permutation of chunks repeats after 1024 bytes.
  struct alignas(1024) SharedStorage {
    char bytes[Work::kBytes];
  };
  using TensorStorage = SharedStorage;
  using Arguments = Work;
  using Params = Work;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE HopperEpilogue(const Params& params) : work_(params) {}

  template <class ProblemShape, class TileShape, class Coordinate, class Engine, class Layout,
            class Mma, class Rest>
  CUTLASS_DEVICE void operator()(const ProblemShape&, const TileShape&,
                                 const Coordinate& coordinate,
                                 const cute::Tensor<Engine, Layout>& accumulators, const Mma&,
                                 const Rest&, int thread, char* memory) {
    static_assert(cute::size(Layout{}) == WideNumbers::kCount);
    const TilePlace place =
        wide_place(work_.features, cute::get<0>(coordinate), cute::get<1>(coordinate));
    // The second tile of a cluster may lie beyond the last row.
    if (place.rows <= 0 || place.columns <= 0) return;
    float numbers[WideNumbers::kCount];
#pragma unroll
    for (int i = 0; i < WideNumbers::kCount; ++i) numbers[i] = accumulators(i);
    const int base = static_cast<int>(memory - reinterpret_cast<char*>(block_memory));
    work_(numbers, place, thread, base);
  }

 private:
  const Work& work_;
};

template <class Element, class Work>
struct HopperKernel {
  using Epilogue =
      cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<HopperEpilogue<Work>>;
  using MainLoop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8,
      Element, cutlass::layout::ColumnMajor, 8, float, HopperTile, HopperCluster,
      cutlass::gemm::collective::StageCount<kHopperStages>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, MainLoop,
                                                      Epilogue, cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(cute::is_same_v<typename MainLoop::TiledMma, HopperMma<Element>>);
  static_assert(Kernel::MaxThreadsPerBlock == kHopperThreads);
  static_assert(offsetof(typename Kernel::SharedStorage, tensors) % 1024 == 0);
  static_assert(Kernel::SharedStorageSize <=
                cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);

  static void run(const Work& work) {
    const Features& features = work.features;
    if (features.rows == 0 || features.columns == 0) return;
    const auto check = [](cutlass::Status status, const char* what) {
      if (status == cutlass::Status::kSuccess) return;
      const cudaError_t error = cudaGetLastError();
      throw std::runtime_error(std::string(what) + ": " + cutlass::cutlassGetStatusString(status) +
                               (error ? std::string(", ") + cudaGetErrorString(error) : ""));
    };
    const auto* const image = static_cast<const Element*>(features.image);
    const auto* const text = static_cast<const Element*>(features.text);
    const auto stride = cute::make_stride(int64_t(features.width), cute::_1{}, int64_t(0));
    typename Kernel::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                         {features.rows, features.columns, features.width, 1},
                                         {image, stride, text, stride},
                                         work,
                                         {}};
    // Clusters go through bands of 8 tiles along the columns, so that concurrent clusters share
    // operands in L2.
    arguments.scheduler.max_swizzle_size = 8;
    Gemm gemm;
    check(gemm.can_implement(arguments), "the features don't suit the Hopper kernel");
    if (reinterpret_cast<uintptr_t>(image) % 16 || reinterpret_cast<uintptr_t>(text) % 16)
      throw std::invalid_argument("the features aren't aligned to 16 bytes");
    check_encoder();
    auto& hardware = arguments.hw_info;
    check_cuda(cudaGetDevice(&hardware.device_id));
    check_cuda(cudaDeviceGetAttribute(&hardware.sm_count, cudaDevAttrMultiProcessorCount,
                                      hardware.device_id));
    const auto stream = static_cast<cudaStream_t>(features.stream);
    check(gemm.initialize(arguments, nullptr, stream), "the Hopper kernel can't start");
    check(gemm.run(stream), "the Hopper kernel can't start");
  }

 private:
  // CUTLASS goes on with a descriptor of the tensor memory accelerator that it could not make. Our
  // tensors meet its conditions, so only an old driver can lack the function.
  static void check_encoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found));
#else
    check_cuda(
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error(
          "the driver is older than CUDA 12 and has no cuTensorMapEncodeTiled");
  }
  static void check_cuda(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  }
};

// Calls run(work) of the kernel for the operands' type.
template <class Work>
void run_on_hopper(const Work& work) {
  work.features.bfloat16 ? HopperKernel<cutlass::bfloat16_t, Work>::run(work)
                         : HopperKernel<cutlass::half_t, Work>::run(work);
}

}  // namespace bclip::cuda
