// The instruction set that the rest of a unit is compiled for: BCLIP_ISA, one of portable, avx2,
// avx512, vnni and amx. The build compiles every *_isa.cpp once each with -DBCLIP_ISA=portable,
// avx2 and avx512. Other units define it themselves.
//
// Inline functions of headers that come before this one are shared with code that runs on every
// processor: include standard headers and contracts there. Compiler flags in place of the pragma
// would compile those for one processor. Headers that come after it lie in namespace
// bclip::cpu::BCLIP_ISA, so no two instruction sets share a symbol.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "csrc/cpu/simd/isa.h"
#include "csrc/cpu/simd/scratch.h"
#include "csrc/philox.h"

#ifndef BCLIP_ISA
#error "define BCLIP_ISA: the build compiles a *_isa.cpp once for each instruction set"
#endif

#define BCLIP_JOIN_EXPANDED(a, b) a##b
#define BCLIP_JOIN(a, b) BCLIP_JOIN_EXPANDED(a, b)
#define BCLIP_NUMBER_portable 0
#define BCLIP_NUMBER_avx2 1
#define BCLIP_NUMBER_avx512 2
#define BCLIP_NUMBER_vnni 3
#define BCLIP_NUMBER_amx 4
#define BCLIP_ISA_NUMBER BCLIP_JOIN(BCLIP_NUMBER_, BCLIP_ISA)

// BCLIP_ISA_AVAILABLE: this compiler can make code for the instruction set. The unit stays empty
// elsewhere.
#if BCLIP_ISA_NUMBER == BCLIP_NUMBER_portable
#define BCLIP_ISA_AVAILABLE 1
#elif BCLIP_ISA_NUMBER == BCLIP_NUMBER_amx
#ifdef BCLIP_AMX_TARGET
#define BCLIP_ISA_AVAILABLE 1
#endif
#elif defined(BCLIP_X86_TARGETS)
#define BCLIP_ISA_AVAILABLE 1
#endif

#ifdef BCLIP_ISA_AVAILABLE

#if BCLIP_ISA_NUMBER > 0
#define BCLIP_X86 1
#include <immintrin.h>
#if BCLIP_ISA_NUMBER > 1
#define BCLIP_AVX512 1
// GCC 12's own intrinsics start from an undefined vector.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#else
#define BCLIP_AVX2 1
#endif
#elif defined(__SSE2__)
#define BCLIP_X86 1
#include <emmintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define BCLIP_NEON 1
#include <arm_neon.h>
#endif

#if BCLIP_ISA_NUMBER == BCLIP_NUMBER_avx2
#pragma GCC target("avx2,fma")
#elif BCLIP_ISA_NUMBER == BCLIP_NUMBER_avx512
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#elif BCLIP_ISA_NUMBER == BCLIP_NUMBER_vnni
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#elif BCLIP_ISA_NUMBER == BCLIP_NUMBER_amx
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#endif

#define BCLIP_MEMBER_INLINE inline __attribute__((always_inline))
#define BCLIP_INLINE static BCLIP_MEMBER_INLINE

#endif  // BCLIP_ISA_AVAILABLE
