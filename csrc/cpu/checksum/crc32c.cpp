#include "csrc/checksum.h"

#include <array>
#include <cstring>

#include "csrc/cpu/simd/isa.h"
#ifdef BCLIP_X86_TARGETS
#include <nmmintrin.h>
#endif

namespace bclip::cpu {
namespace {

constexpr uint32_t kReflectedPolynomial = 0x82f63b78;
constexpr int kSlices = 8;
using Tables = std::array<std::array<uint32_t, 256>, kSlices>;

// tables[k][b]: the effect of byte b, followed by k zero bytes.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? kReflectedPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (int k = 1; k < kSlices; ++k) {
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t crc = tables[k - 1][byte];
      tables[k][byte] = crc >> 8 ^ tables[0][crc & 255];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

// Eight bytes at a time by tables (Kounavis and Berry, 2005, "slicing-by-8").
uint32_t by_tables(uint32_t crc, const uint8_t* data, size_t size) {
  for (; size >= kSlices; data += kSlices, size -= kSlices) {
    uint32_t next = 0;
    for (int i = 0; i < kSlices; ++i) {
      const uint32_t byte = data[i] ^ (i < 4 ? crc >> 8 * i & 255 : 0);
      next ^= kTables[kSlices - 1 - i][byte];
    }
    crc = next;
  }
  for (; size; --size) crc = crc >> 8 ^ kTables[0][(crc ^ *data++) & 255];
  return crc;
}

#ifdef BCLIP_X86_TARGETS
__attribute__((target("sse4.2"))) uint32_t by_instruction(uint32_t crc, const uint8_t* data,
                                                          size_t size) {
  uint64_t wide = crc;
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = static_cast<uint32_t>(wide);
  for (; size; --size) crc = _mm_crc32_u8(crc, *data++);
  return crc;
}
#endif

}  // namespace

uint32_t crc32c(std::string_view data) {
  const auto* const bytes = reinterpret_cast<const uint8_t*>(data.data());
#ifdef BCLIP_X86_TARGETS
  // AVX2 implies SSE4.2.
  if (isa_in_use() != Isa::kPortable) return ~by_instruction(~0u, bytes, data.size());
#endif
  return ~by_tables(~0u, bytes, data.size());
}

}  // namespace bclip::cpu
