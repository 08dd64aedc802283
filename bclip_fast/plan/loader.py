"""The images and bytes that the GPUs take from the loader and the storage, and whether these keep up."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError
from bclip_fast.hardware import Cluster
from bclip_fast.io.jsonl import read_lines
from bclip_fast.train.config import TrainConfig

from .samples import Samples

# Mean bytes of a sample in the shards of `bclip bench loader`: 558 figures, whose shorter side has at most 384 pixels.
BENCHMARK_BYTES = 46_080
# DALI decodes about 7,000 images of ImageNet a second on an A100, three quarters of them in its hardware decoder
# (NVIDIA's figure, as NVIDIA/DALI#5362 cites it). We did not measure it.
DALI_IMAGES = 7_000.0


@dataclass(frozen=True)
class LoaderPlan:
    """Images and bytes per second.

    needed: images for a rank, at the planned duration of its step.
    capacity: images that the loader of a rank makes, or its storage reads. None if no rate is known.
    core_rate: images of a core. None if no rate is known.
    source: origin of `core_rate`.
    cores: CPU cores that a rank needs.
    available: CPU cores that a rank has. 0: unknown.
    needed_bytes: bytes that a rank reads.
    storage_bytes: bytes that its storage gives it. 0: unknown.
    """

    needed: float
    capacity: float | None
    core_rate: float | None
    source: str
    cores: float | None
    available: float
    needed_bytes: float
    storage_bytes: float

    @property
    def is_storage_slow(self) -> bool:
        """Whether the storage is slower than the GPUs."""
        return 0 < self.storage_bytes < self.needed_bytes

    @property
    def is_loader_slow(self) -> bool:
        """Whether the decoder is slower than the GPUs."""
        return self.capacity is not None and self.capacity < self.needed


def core_rate(cluster: Cluster, samples: Samples, given: float) -> tuple[float | None, str]:
    """Images per second of a core, and the origin of the number.

    The measured rate of our loader is that of images of `BENCHMARK_BYTES`. Larger images take longer in proportion to
    their bytes. The rate of smaller images stays, because the resized image does not become smaller.

    Args:
        given: cluster.core_images_per_s.
    """
    if given:
        return given, "cluster.core_images_per_s"
    rows = [row for row in _loader_rows() if row["contender"] == "ours"]
    own = [row for row in rows if row["device"] == cluster.device.name] if cluster.cpu else []
    rows = own or rows
    if not rows:
        return None, "no row of `bclip bench loader` in benchmarks/results"
    measured = statistics.median(row["samples_per_cpu_second"] for row in rows)
    scale = min(1.0, BENCHMARK_BYTES / samples.image_bytes)
    where = f"{measured:,.0f} measured on a core of {rows[-1]['device']}"
    if not own:
        where += ", not on the planned nodes"
    if scale < 1:
        where += f"; divided by {1 / scale:.2f}, the size of the images against that of {BENCHMARK_BYTES / 1e3:.0f} kB"
    return measured * scale, where


def plan_loader(config: TrainConfig, cluster: Cluster, samples: Samples, rank_batch: int, seconds: float) -> LoaderPlan:
    """The loader's part of a run whose steps take `seconds`."""
    needed = rank_batch / seconds
    rate, source = core_rate(cluster, samples, config.cluster.core_images_per_s)
    storage = config.cluster.storage_gb_per_s * 1e9 / cluster.ranks_per_node
    if config.data.loader == "dali" and not cluster.cpu:
        source = f"DALI on the GPU: {DALI_IMAGES:,.0f} images/s on an A100 by NVIDIA's figure, NOT MEASURED"
        return LoaderPlan(needed, DALI_IMAGES, None, source, None, cluster.cores, needed * samples.image_bytes, storage)
    threads = min(config.data.num_threads, cluster.cores or config.data.num_threads)
    return LoaderPlan(
        needed,
        None if rate is None else threads * rate,
        rate,
        source,
        None if rate is None else needed / rate,
        cluster.cores,
        needed * samples.image_bytes,
        storage,
    )


def check_loader(config: TrainConfig, cluster: Cluster, samples: Samples, plan: LoaderPlan) -> None:
    """Check that loader and storage are as fast as the GPUs. A CPU shares its cores with them, so nothing waits.

    Raises:
        UserError: one of them is slower. The message names what would help.
    """
    if cluster.cpu or config.cluster.allow_slow_loader:
        return
    problems, remedies = [], []
    if plan.is_loader_slow:
        assert plan.capacity is not None
        problems.append(
            f"a GPU takes {plan.needed:,.0f} images/s, but data.loader={config.data.loader} with "
            f"data.num_threads={config.data.num_threads} makes {plan.capacity:,.0f} ({plan.source})"
        )
        if plan.core_rate is not None and plan.cores is not None:
            threads = int(-(-plan.needed // plan.core_rate))
            if threads <= plan.available:
                remedies.append(f"data.num_threads={threads} of the {plan.available:g} cores a GPU")
            else:
                remedies.append(
                    f"nodes with {threads * cluster.ranks_per_node} cores (cluster.cores_per_node), and "
                    f"data.num_threads={threads}"
                )
            if plan.needed <= DALI_IMAGES:
                remedies.append(f"data.loader=dali, about {DALI_IMAGES:,.0f} images/s on an A100 by NVIDIA's figure")
            if samples.image_bytes > BENCHMARK_BYTES:
                remedies.append(
                    f"smaller stored images: `bclip ingest build --max_short_side 384` makes about "
                    f"{BENCHMARK_BYTES / 1e3:.0f} kB of a figure instead of {samples.image_bytes / 1e3:.0f} kB"
                )
    if plan.is_storage_slow:
        problems.append(
            f"a node reads {plan.needed_bytes * cluster.ranks_per_node / 1e9:.3g} GB/s, but "
            f"cluster.storage_gb_per_s={config.cluster.storage_gb_per_s:g}"
        )
        remedies.append("shards on local disks, or smaller stored images (ingest's max_short_side)")
    if problems:
        raise UserError(
            f"the loader cannot keep up: {'; '.join(problems)}. These help: {'; '.join(remedies)}. "
            "cluster.allow_slow_loader=true plans the run nevertheless"
        )


def _loader_rows() -> list[dict[str, Any]]:
    package = Path(__file__).parents[1]
    folders = [folder / "benchmarks" / "results" for folder in (package.parent, package)]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    paths = sorted(folder.glob("*.jsonl")) if folder else []
    return [row for path in paths for row in read_lines(path) if row.get("operator") == "loader"]
