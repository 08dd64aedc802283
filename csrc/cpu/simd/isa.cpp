#include "csrc/cpu/simd/isa.h"

#include <cstdlib>
#include <stdexcept>

#ifdef BCLIP_AMX_TARGET
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bclip::cpu {

namespace {

// Best first.
std::vector<Isa> supported() {
  std::vector<Isa> isas;
#ifdef BCLIP_X86_TARGETS
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) isas.push_back(Isa::kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(Isa::kAvx2);
#endif
  isas.push_back(Isa::kPortable);
  return isas;
}

Isa requested_or_best() {
  const std::vector<Isa> isas = supported();
  const char* requested = std::getenv("BCLIP_CPU_ISA");
  if (!requested || !*requested) return isas.front();
  std::string names;
  for (const Isa isa : isas) {
    if (requested == std::string(name_of(isa))) return isa;
    names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  throw std::invalid_argument("BCLIP_CPU_ISA is '" + std::string(requested) +
                              "'; this processor and build have " + names);
}

#ifdef BCLIP_AMX_TARGET
bool request_amx() {
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) ||
      (d & (amx_bf16 | amx_tile)) != (amx_bf16 | amx_tile))
    return false;
  if (!__builtin_cpu_supports("avx512bf16") || isa_in_use() != Isa::kAvx512) return false;
  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#else
bool request_amx() { return false; }
#endif

}  // namespace

const char* name_of(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "plain";
}

Isa isa_in_use() {
  static const Isa isa = requested_or_best();
  return isa;
}

std::string instruction_set() { return name_of(isa_in_use()); }

bool has_vnni() {
#ifdef BCLIP_X86_TARGETS
  return isa_in_use() == Isa::kAvx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool has_amx() {
  static const bool granted = request_amx();
  return granted;
}

}  // namespace bclip::cpu
