"""CRC-32C, the checksum of the members of a shard."""

from __future__ import annotations

from functools import cache

try:
    from bclip_fast._cpu import crc32c
except ImportError:  # a build without compiled parts

    def crc32c(data: bytes) -> int:
        """The CRC-32C (RFC 3720, appendix B.4) of the data. The compiled function is a hundred times faster."""
        table, crc = _table(), 0xFFFFFFFF
        for byte in data:
            crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
        return crc ^ 0xFFFFFFFF


@cache
def _table() -> list[int]:
    """The CRC of each byte, for the polynomial 0x1EDC6F41 with its bits reversed."""
    table = list(range(256))
    for _ in range(8):
        table = [(crc >> 1) ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table


__all__ = ["crc32c"]
