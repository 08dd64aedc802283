// The device functions that our kernels call. The kernels use nothing else of CUDA except the
// keywords __global__, __device__ and __launch_bounds__. The functions have two implementations.
// Those below are instructions of GPUs from sm_80 on. Those of emulator/device.h run on a CPU and
// detect faults that a GPU ignores. So every kernel is tested without a GPU.
//
// Fragments are those of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating
// point type"). With g = lane / 4 and t = lane % 4, a lane holds these elements. A register of A or
// B holds two neighbours.
//   A (16 x 16), 4 registers: rows g, g + 8, g, g + 8;
//                             columns 2t, 2t, 2t + 8, 2t + 8 and the next column of each;
//   B (16 x 8), 2 registers:  rows 2t, 2t + 8 and the next row of each; column g;
//   C (16 x 8), 4 floats:     row g, columns 2t and 2t + 1; row g + 8, the same columns.
#pragma once

#include <cstdint>

namespace bclip::cuda {

struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

// 16 bytes: the width of every transfer between global and shared memory.
struct alignas(16) Quad {
  uint32_t words[4];
};

struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;
  void* stream;
};

}  // namespace bclip::cuda

#ifdef BCLIP_CUDA_EMULATOR
#include "csrc/cuda/emulator/device.h"
#else

#include <stdexcept>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace bclip::cuda {

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int lane_index() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_index() { return threadIdx.x >> 5; }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }

__device__ __forceinline__ void block_barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }
// A barrier of kThreads threads of the block, whole warps. kBarrier, from 1 to 15, tells it from
// barriers of other threads. In the emulator kThreads is all of the block.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier() {
  static_assert(kBarrier > 0 && kBarrier < 16 && kThreads % 32 == 0);
  asm volatile("barrier.cta.sync.aligned %0, %1;" : : "n"(kBarrier), "n"(kThreads) : "memory");
}

// The value of lane `lane ^ mask`, and of lane `source`. All lanes of the warp must call these
// functions, and those below.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
template <class T>
__device__ __forceinline__ T shuffle(T value, int source) {
  return __shfl_sync(~0u, value, source);
}

extern __shared__ Quad block_memory[];

// An array in the shared memory of the block. It starts at offset `byte`.
template <class T>
struct Shared {
  int byte;

  __device__ __forceinline__ T* place(int index) const {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(block_memory) + byte) + index;
  }
  __device__ __forceinline__ uint32_t address(int index) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(place(index)));
  }
  __device__ __forceinline__ T load(int index) const { return *place(index); }
  __device__ __forceinline__ void store(int index, T value) const { *place(index) = value; }
  template <class Wide>
  __device__ __forceinline__ Wide load_as(int index) const {
    return *reinterpret_cast<const Wide*>(place(index));
  }
  template <class Wide>
  __device__ __forceinline__ void store_as(int index, Wide value) const {
    *reinterpret_cast<Wide*>(place(index)) = value;
  }
};

// ldmatrix.x4: four 8 x 8 matrices. `index` is the first element of row lane % 8 of matrix (lane /
// 8). From each matrix, a lane gets two elements of row lane / 4: in column 2 (lane % 4) and in the
// next. From a transposed matrix, it gets the elements of column lane / 4 in these two rows.
template <class T>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], Shared<T> from, int index) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from.address(index))
               : "memory");
}
template <class T>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], Shared<T> from,
                                                         int index) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from.address(index))
               : "memory");
}

// sum += A B
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1);
template <>
__device__ __forceinline__ void multiply<Half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<Bfloat16>(float (&sum)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Every access of a kernel to global memory, except copy_async. The emulator counts their sectors.
template <class T>
__device__ __forceinline__ T load_global(const T* from) {
  return *from;
}
template <class T>
__device__ __forceinline__ void store_global(T* to, T value) {
  *to = value;
}
// The compiler may split a plain store of 16 bytes.
__device__ __forceinline__ void store_global(Quad* to, Quad value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(value.words[0]), "r"(value.words[1]),
                 "r"(value.words[2]), "r"(value.words[3])
               : "memory");
}
// Marks the end of a loop or branch that some lanes leave earlier than others. It is no
// instruction. The emulator pairs the accesses of the lanes between two marks, or between a mark
// and a function of the whole warp, by their order.
__device__ __forceinline__ void rejoin_lanes() {}

// Copies 16 bytes from global to shared memory, or writes zeros if not `valid`. The thread may read
// them after wait_for_copies. Other threads may read them after a later barrier. wait_for_copies<n>
// waits for all but the last n groups.
template <class T>
__device__ __forceinline__ void copy_async(Shared<T> to, int index, const T* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to.address(index)), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) { return __log2f(x); }
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A product that is rounded by itself. Compilers fuse ordinary products with the sums that follow.
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// Two numbers in a register, the first in the lower half, rounded to nearest even.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack<Bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

struct alignas(8) Pair {
  float low, high;
};
template <class T>
__device__ __forceinline__ Pair unpack(uint32_t pair);
template <>
__device__ __forceinline__ Pair unpack<Half>(uint32_t pair) {
  const float2 both = __half22float2(reinterpret_cast<const __half2&>(pair));
  return {both.x, both.y};
}
template <>
__device__ __forceinline__ Pair unpack<Bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

template <class Arguments>
void launch(void (*kernel)(Arguments), const Launch& where, Arguments arguments) {
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  };
  if (where.blocks == 0) return;
  if (where.blocks >= int64_t(1) << 31) throw std::invalid_argument("more blocks than a grid has");
  if (where.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               where.shared_bytes));
  }
  void* list[] = {&arguments};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(where.blocks),
                         dim3(where.threads), list, where.shared_bytes,
                         static_cast<cudaStream_t>(where.stream)));
}

}  // namespace bclip::cuda
#endif
