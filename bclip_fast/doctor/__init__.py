"""`bclip doctor`: the installation, and the backend that each operator takes here, with reasons."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass

from bclip_fast.version import __version__

from . import packages


@dataclass(frozen=True)
class DoctorConfig:
    """Print backends, versions, devices, and the backend that each operator takes here, with reasons."""

    imports: bool = False
    """Import every optional package in a separate process, to tell which ones are broken. Takes some seconds."""
    json: bool = False
    """Print the report as JSON."""


def run(config: DoctorConfig) -> None:
    """Print the report."""
    versions = {
        "bclip_fast": __version__,
        "python": platform.python_version(),
        "torch": packages.version("torch"),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
    if not config.json:
        # The import of torch, which takes longer than all the rest, comes after the first line.
        print(
            "bclip_fast {bclip_fast}, Python {python}, torch {torch}, {system}, {cores} cores".format(**versions),
            flush=True,
        )
    from . import backends

    if config.json:
        print(json.dumps({**versions, **backends.report(), "packages": packages.report(config.imports)}))
        return
    print("\n".join(backends.lines()), flush=True)
    print("\n".join(packages.lines(packages.report(config.imports))))
    if not config.imports:
        print("\n`bclip doctor --imports` also imports every package, to tell which ones are broken.")
