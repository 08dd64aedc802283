"""Libraries, devices and ranks on which the last bits of a run depend."""

from __future__ import annotations

import importlib.metadata

from bclip_fast import distributed
from bclip_fast.ops.fingerprint import fingerprint

# Other packages that compute or decode in a run.
_PACKAGES = ("deepspeed", "numpy", "peft", "pillow", "tokenizers")


def environment() -> dict[str, str]:
    """The facts by name. A missing package is left out."""
    device = distributed.device()
    # The CPU decodes the images, also if a GPU computes.
    facts = {f"cpu {name}": value for name, value in fingerprint("cpu").items()} if device.type == "cuda" else {}
    facts |= fingerprint(device.type, device.index or 0)
    for name in _PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts | {"ranks": str(distributed.world_size())}
