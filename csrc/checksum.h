// CRC-32C, the checksum of the members of shards (docs/data.md gives the reasons).
#pragma once

#include <cstdint>
#include <string_view>

namespace bclip::cpu {

// The CRC-32C of `data` (RFC 3720: polynomial 0x1EDC6F41, reflected, start and end inverted).
uint32_t crc32c(std::string_view data);

}  // namespace bclip::cpu
