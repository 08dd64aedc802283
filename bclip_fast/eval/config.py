"""The configuration of an evaluation, for the command and for Python."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from ..errors import UserError
from . import probe, tasks
from .embed import Format, Precision
from .faiss_index import Index
from .retrieval import Duplicates


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to evaluate on, and how."""

    data: str = ""
    """Shards (folder with dataset.json), a folder with a folder of images per class, or a .csv file; a run's own shards
    unless given."""
    split: str = "val"
    """Split of the data; a task of the package knows its own."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """retrieval, zero_shot, probe or vqa; a task of the package (pcam, lc25000_lung, vqa_rad, ...); or a TOML file of
    one. Repeat it for several. None given: retrieval and zero_shot as far as the data allow."""
    label: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Label kind for zero_shot: a metadata field of shards, a CSV column, or `class`; repeat it for several."""
    prompts: str = "auto"
    """A task's prompts (pcam, lc25000_lung, ...), a TOML file, or auto: the task's own, else the labels' own words."""
    duplicates: Duplicates = "strict"
    """In retrieval, what is right beside the query's own pair: nothing (`strict`, as in the paper), pairs with the same
    text (`captions`), with the same picture (`images`), or `any` of both."""
    index: Index = "exact"
    """exact ranks all candidates; faiss_flat, hnsw and ivf search with faiss, the last two approximately."""
    share: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Parts of the training data that a probe is trained on."""
    shots: tuple[int, ...] = ()
    """Samples a class that a probe is trained on, in addition."""
    num_seeds: int = 3
    """Draws of each part, whose mean and deviation are reported."""
    protocol: probe.Protocol = "held_out"
    """`elevater` reports a probe's best epoch on the test set, as the paper's toolkit does: for comparison alone."""
    seed: int = 0
    cache: str = "auto"
    """Folder for embeddings; auto: BCLIP_CACHE or ~/.cache/bclip_fast/embeddings; none: they are not kept."""
    keep: Format = "fp32"
    """Format in which embeddings are kept."""
    device: str = "auto"
    """auto takes CUDA where it is."""
    precision: Precision = "fp32"
    """Number format of the towers; embeddings are compared in float32. auto: bf16 where the device multiplies it in
    hardware, else fp32."""
    batch_size: int = 64
    num_workers: int = 2
    """Threads that decode and resize images."""
    num_gallery_queries: int = 6
    """Queries a direction shown in the report."""
    progress: bool = True

    def __post_init__(self) -> None:
        for task in self.task:
            tasks.load(task)
        if not all(0 < share <= 1 for share in self.share) or not all(num >= 1 for num in self.shots):
            raise UserError(f"share {self.share} must lie in (0, 1], shots {self.shots} must be at least 1")
        if self.num_seeds < 1 or not (self.share or self.shots):
            raise UserError("a probe needs one seed and one share or number of shots at least")
        if self.num_gallery_queries < 1:
            raise UserError(f"num_gallery_queries is {self.num_gallery_queries}: it must be at least 1")
