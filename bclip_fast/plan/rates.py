"""Rates that turn operations into time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bclip_fast.hardware import Cluster, peak_flops_per_second, results_name
from bclip_fast.io.jsonl import read_lines
from bclip_fast.train.precision import autocast_precision

# Share of the peak rate that a step reaches, for devices without a measurement. Not measured.
_FRACTION = 0.4


class Rates:
    """Floating-point operations per second of a rank, in the towers and in the loss.

    They are `bclip bench`'s measurements on such a device, or else a fraction of the rate of its matmuls.

    source: explanation of the rates, for the output.
    """

    def __init__(self, cluster: Cluster, precision: str) -> None:
        is_fp8, precision = precision == "fp8", autocast_precision(precision)
        device, rows = cluster.device.name, measured(cluster.device.name)
        # The ranks of a node share its CPU. The benchmark used all of it.
        num_sharing = cluster.ranks_per_node if cluster.cpu else 1
        ours = [row for row in rows if row["contender"].startswith("ours")]
        steps = [row for row in ours if row["operator"] == "step" and row["dtype"] == precision]
        steps = [row for row in steps if row["contender"] == "ours" or row["contender"].startswith("ours:")]
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
        losses = [row for row in ours if row["operator"] == "contrastive" and row["dtype"] == dtype]
        losses = [row for row in losses if row["batch"] >= 4096 and not row["contender"].endswith("reference")]
        self.tower = self.loss = None
        self.source = f"no row for {device} in benchmarks/results; `bclip bench step` on that device writes it"
        peak = peak_flops_per_second(device, precision)
        if peak is None and losses:
            peak = statistics.median(row["matmul_flops_per_second"] for row in losses)
        if steps:
            self.tower = statistics.median(row["flops"] / row["seconds"] for row in steps) / num_sharing
            self.source = f"measured on {device}: {self.tower:.3g} FLOP/s of a rank in a step (median of {len(steps)})"
        elif peak:
            self.tower = _FRACTION * peak / num_sharing
            self.source = f"NOT MEASURED: {_FRACTION:.0%} of the {peak:.3g} FLOP/s that matmuls of {device} reach"
        self.loss = self.tower
        if losses:
            self.loss = statistics.median(row["flops"] / row["seconds"] for row in losses) / num_sharing
            self.source += f"; {self.loss:.3g} in the loss, measured (median of {len(losses)})"
        if is_fp8:
            self.source += "; fp8 counts as bf16, because its casts can take the time that its products save"

    def compute(self, flops: Mapping[str, float], num_ranks: int) -> dict[str, float] | None:
        """Seconds of computation by part, for the operations of a step over all ranks. None if no rate is known."""
        if self.tower is None or self.loss is None:
            return None
        rates = {"loss": self.loss}
        return {name: count / num_ranks / rates.get(name, self.tower) for name, count in flops.items()}


def measured(device: str) -> list[dict[str, Any]]:
    """The rows of benchmarks/results for a device.

    In a source tree, the folder is beside the package. In an installation, it is inside.
    """
    package = Path(__file__).parents[1]
    paths = [folder / "benchmarks" / "results" / results_name(device) for folder in (package.parent, package)]
    path = next((path for path in paths if path.is_file()), None)
    return [] if path is None else read_lines(path)
