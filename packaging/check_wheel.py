"""Check an installed wheel with compiled modules. It needs Pillow, but not torch."""

from __future__ import annotations

import ctypes
import io
import sys
from pathlib import Path

from PIL import Image

from bclip_fast import _cpu


def check() -> str:
    """Decode a JPEG with the wheel's libjpeg-turbo as Pillow does, and return the instruction set of the kernels."""
    width, height = 40, 24
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    file = io.BytesIO()
    image.save(file, "JPEG")
    assert _cpu.crc32c(b"123456789") == 0xE3069283
    assert tuple(_cpu.jpeg_size(file.getvalue())) == (height, width)
    pixels = ctypes.create_string_buffer(3 * width * height)
    _cpu.decode_jpeg(file.getvalue(), ctypes.addressof(pixels), height, width, 1, True)
    assert pixels.raw == Image.open(file).convert("RGB").tobytes()
    licenses = Path(_cpu.__file__).parent / "licenses"
    assert {path.name for path in licenses.iterdir()} == {"LICENSE.md", "README.ijg"}, (
        "libjpeg-turbo's licence is missing"
    )
    return str(_cpu.instruction_set())


if __name__ == "__main__":
    print(f"{_cpu.__file__}: works, {check()}, Python {sys.version.split()[0]}")
