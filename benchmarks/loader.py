"""`bclip bench loader`: shards to batches, by ours, by webdataset with open_clip's transform, and by DALI."""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bclip_fast.data.loader import Loader
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.transform import Preprocess, PreprocessConfig, normalize
from bclip_fast.errors import UserError
from bclip_fast.model.tokenizer import Tokenizer

from .cases import Unavailable, open_clip, shared_data
from .measure import cpu_seconds
from .table import print_table

log = logging.getLogger(__name__)

Tokenize = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class LoaderConfig:
    """One pass over a split of shards: read, decode, random resized crop, resize, tokenise."""

    shards: str = ""
    """Folder of shards. Empty: shards in a temporary folder, of the figures in BCLIP_SHARED_DATA's pmc_articles, or of
    synthetic images if that folder is missing."""
    max_short_side: int = 384
    """Limit of a figure's shorter side in the temporary shards, as in `bclip ingest build`. 0 keeps all sizes."""
    size: int = 224
    """Side of the resized square images in pixels."""
    batch_size: int = 32
    """Samples in a batch."""
    workers: int = 1
    """Number of decoding threads. webdataset uses as many processes, or only the main process if it is 1."""
    rounds: int = 3
    """Number of rounds. A round is a pass of each loader. Ratios are medians over the rounds. Times are those of the
    fastest round."""
    dali: bool = True
    """Also time DALI."""

    def __post_init__(self) -> None:
        if min(self.size, self.batch_size, self.workers, self.rounds) < 1:
            raise UserError(
                f"loader.size={self.size}, batch_size={self.batch_size}, workers={self.workers}, rounds={self.rounds}: "
                "need at least 1 each"
            )


@dataclass
class Source:
    """The input of all contenders: shards, the paths of their tar files, and the tokenizer."""

    config: LoaderConfig
    dataset: ShardDataset
    tars: list[str]
    tokenize: Tokenize

    @property
    def num_batches(self) -> int:
        """Number of full batches in a pass."""
        return len(self.dataset) // self.config.batch_size

    def stream(self) -> ShardSampler:
        """Return a new sampler."""
        sizes, batch = self.dataset.shard_sizes, self.config.batch_size
        return ShardSampler(sizes, self.dataset.fingerprint, batch_size=batch)


def figures_to_shards(config: LoaderConfig, folder: Path) -> Path:
    """Write shards of ingested articles, or of smooth noise if the articles are missing. Returns the shards' folder."""
    articles = shared_data() / "pmc_articles"
    if articles.is_dir():
        from bclip_fast.ingest.build import IngestConfig, build

        options: dict[str, Any] = dict(val_fraction=0.0, test_fraction=0.0, workers=1, max_shard_megabytes=16)
        build(IngestConfig(str(articles), folder, max_short_side=config.max_short_side, **options))
        return folder
    from PIL import Image

    generator = np.random.default_rng(0)
    with ShardWriter(folder, max_shard_bytes=16 << 20) as writer:
        for number in range(256):
            noise = Image.fromarray(generator.integers(0, 256, (96, 128, 3), dtype=np.uint8))
            data = io.BytesIO()
            noise.resize((512, 384), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
            writer.write(Sample(f"figure{number}", data.getvalue(), f"a figure of noise, number {number}"), "train")
    return folder


# A contender. Each call is one pass over the shards, a generator of float or uint8 batches. The time to build the
# contender does not count.
Pass = Callable[[], Iterator[Tensor]]


def webdataset_pass(source: Source) -> Pass:
    """Return webdataset with open_clip's transform."""
    try:
        import webdataset
    except ImportError:
        raise Unavailable("the peer webdataset is not installed") from None
    library, config = open_clip(), source.config
    transform = library.image_transform(config.size, is_train=True, mean=None, std=None)

    def samples() -> Any:
        data = webdataset.WebDataset(source.tars, shardshuffle=False, empty_check=False)
        return data.decode("pilrgb").to_tuple("jpg", "txt").map_tuple(transform, lambda text: text)

    def run_pass() -> Iterator[Tensor]:
        workers = config.workers if config.workers > 1 else 0
        collate = webdataset.filters.default_collation_fn
        loader = torch.utils.data.DataLoader(
            samples(), config.batch_size, num_workers=workers, drop_last=True, collate_fn=collate
        )
        for images, texts in loader:
            source.tokenize(list(texts))
            yield images

    return run_pass


def dali_pass(source: Source) -> Pass:
    """Return DALI's reader of WebDatasets, random crop and normalisation, as in DALI's documentation."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError:
        raise Unavailable("the peer nvidia-dali is not installed") from None
    config, preprocess = source.config, PreprocessConfig()
    scale = [255 * value for value in preprocess.mean], [255 * value for value in preprocess.std]

    @pipeline_def(batch_size=config.batch_size, num_threads=config.workers, device_id=None)
    def graph() -> Any:
        jpegs, texts = fn.readers.webdataset(paths=source.tars, ext=["jpg", "txt"], name="reader")
        images = fn.decoders.image_random_crop(jpegs, random_area=[0.9, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.resize(images, size=[config.size] * 2, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=scale[0], std=scale[1]), texts

    pipeline = graph()
    pipeline.build()

    def run_pass() -> Iterator[Tensor]:
        for _ in range(source.num_batches):
            images, texts = pipeline.run()
            source.tokenize([bytes(texts.at(i)).decode() for i in range(len(texts))])
            yield torch.from_numpy(images.as_array())
        pipeline.reset()

    return run_pass


def our_pass(source: Source, loader: type[Loader]) -> Pass:
    """Return one of our loaders."""

    def run_pass() -> Iterator[Tensor]:
        preprocess = Preprocess(PreprocessConfig(size=source.config.size))
        options: dict[str, Any] = dict(num_threads=source.config.workers)
        with loader(source.dataset, source.tokenize, source.stream(), preprocess, **options) as batches:
            for _ in range(source.num_batches):
                yield next(batches).images

    return run_pass


def contenders(source: Source) -> dict[str, Callable[[], Pass]]:
    """Return the maker of each contender by name. It raises Unavailable or UserError with the reason."""

    def ours_with_dali() -> Pass:
        from bclip_fast.data.dali_loader import DaliLoader

        return our_pass(source, DaliLoader)

    makers: dict[str, Callable[[], Pass]] = {"webdataset + open_clip": lambda: webdataset_pass(source)}
    if source.config.dali:
        makers["DALI CPU"] = lambda: dali_pass(source)
        makers["ours, DALI CPU"] = ours_with_dali
    makers["ours"] = lambda: our_pass(source, Loader)
    return makers


def measure_loader(config: LoaderConfig) -> list[dict[str, Any]]:
    """Return a row for each loader. Raises AssertionError if the mean pixel of a loader differs from ours."""
    with contextlib.ExitStack() as stack:
        folder = Path(config.shards or stack.enter_context(tempfile.TemporaryDirectory()))
        dataset = ShardDataset(folder if config.shards else figures_to_shards(config, folder / "shards"))
        tars = sorted(str(path) for path in Path(dataset.root).glob(f"{dataset.split}-*.tar"))
        captions = [dataset.caption(i) for i in range(len(dataset))]
        tokenizer = Tokenizer.train(captions, 4000, 256)
        source = Source(config, dataset, tars, tokenizer.encode)
        if not source.num_batches:
            raise UserError(f"loader.batch_size={config.batch_size}: the shards hold {len(dataset)} samples")
        passes: dict[str, Pass] = {}
        for name, make in contenders(source).items():
            try:
                passes[name] = make()
            except (Unavailable, UserError) as reason:
                log.warning("%s is not measured: %s", name, reason)
        means = {name: _mean_pixel(passes[name]()) for name in passes}
        times: dict[str, list[float]] = {name: [] for name in passes}
        cpu_times: dict[str, list[float]] = {name: [] for name in passes}
        for number in range(config.rounds):
            for name, run_pass in passes.items():
                start, cpu_start = time.perf_counter(), cpu_seconds(with_children=True)
                count = sum(len(images) for images in run_pass())
                times[name].append(time.perf_counter() - start)
                cpu_times[name].append(cpu_seconds(with_children=True) - cpu_start)
                assert count == source.num_batches * config.batch_size, f"{name} gave {count} samples"
                log.info("round %d, %s: %.0f samples/s", number + 1, name, count / times[name][-1])
    first = next(iter(times))
    rows = []
    for name, seconds in times.items():
        error = abs(means[name] - means["ours"])
        assert error < 0.02, f"the pixels of {name} are {error:.3f} standard deviations off in the mean"
        rows.append(
            dict(
                operator="loader",
                case=f"{len(dataset)}-{config.size}-{config.batch_size}-{config.workers}",
                contender=name,
                error=error,
                batch=config.batch_size,
                workers=config.workers,
                samples=count,
                seconds=min(seconds),
                samples_per_second=count / min(seconds),
                samples_per_cpu_second=count / min(cpu_times[name]),
                speedup=statistics.median(one / other for one, other in zip(times[first], seconds, strict=True)),
                rounds=config.rounds,
            )
        )
    return rows


def _mean_pixel(batches: Iterator[Tensor]) -> float:
    """Return the mean of all normalised pixels of a pass. Loaders draw different crops of the same images."""
    means = [float((normalize(images) if images.dtype == torch.uint8 else images).mean()) for images in batches]
    return statistics.mean(means)


def show_loader(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    headings = ["contender", "samples/s", "s", "x first", "samples/CPU s", "x first", "mean off"]
    first_rate = rows[0]["samples_per_cpu_second"]
    cells = [
        [
            row["contender"],
            f"{row['samples_per_second']:.0f}",
            f"{row['seconds']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['samples_per_cpu_second']:.0f}",
            f"{row['samples_per_cpu_second'] / first_rate:.2f}",
            f"{row['error']:.4f}",
        ]
        for row in rows
    ]
    print_table(f"{rows[0]['samples']} samples a pass, {rows[0]['workers']} worker(s)", headings, cells)
