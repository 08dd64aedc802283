// Instruction sets: which ones this build has kernels for, which the processor runs, and which one
// is in use.
#pragma once

#include <string>
#include <vector>

// GCC on x86-64 compiles a kernel for several instruction sets and leaves the choice to the running
// process. Other compilers and processors get the portable kernels.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BCLIP_X86_TARGETS 1
#ifdef __linux__
#define BCLIP_AMX_TARGET 1  // the matrix unit, for which a process needs Linux's permission
#endif
#endif

namespace bclip::cpu {

// In order of increasing speed.
enum class Isa { kPortable, kAvx2, kAvx512 };

// "plain", "avx2" or "avx512": the values of BCLIP_CPU_ISA.
const char* name_of(Isa isa);

// The instruction set in use: the processor's best one, or the value of BCLIP_CPU_ISA at the first
// call. Throws std::invalid_argument if the processor or the build lacks the requested one.
Isa isa_in_use();
std::string instruction_set();  // its name

// Whether the 8-bit dot products of AVX-512 may be used.
bool has_vnni();

// Whether the matrix unit may be used. The processor must have it, AVX-512 must be in use, and
// Linux must grant permission, which the first call requests.
bool has_amx();

// Declares a constant that the unit of each instruction set defines in its namespace (target.h).
// The function `getter` returns the constant for an instruction set.
// clang-format off
#ifdef BCLIP_X86_TARGETS
#define BCLIP_DECLARE_KERNELS(Type, name, getter)           \
  namespace portable { extern const Type name; }            \
  namespace avx2 { extern const Type name; }                \
  namespace avx512 { extern const Type name; }              \
  inline const Type& getter(Isa isa) {                      \
    return isa == Isa::kAvx512  ? avx512::name              \
           : isa == Isa::kAvx2 ? avx2::name                 \
                               : portable::name;            \
  }
#else
#define BCLIP_DECLARE_KERNELS(Type, name, getter) \
  namespace portable { extern const Type name; }  \
  inline const Type& getter(Isa) { return portable::name; }
#endif
// clang-format on

}  // namespace bclip::cpu
