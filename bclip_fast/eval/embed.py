"""Embed images and texts as L2-normalised float32 matrices."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast.data.image_files import ImageConversion, read_rgb
from bclip_fast.data.transform import Preprocess
from bclip_fast.errors import UserError
from bclip_fast.io.progress import Advance, track
from bclip_fast.ops.processor import native_precision

from . import spot_check
from .datasets import EvalDataset, image_name
from .datasets.subset import SubsetDataset
from .embedding_cache import FORMATS, Computation, EmbeddingCache
from .embedding_key import EmbeddingKey, digest_of_texts, new_text

log = logging.getLogger(__name__)

CacheDtype = Literal["fp32", "bf16", "fp16"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
OnBadImage = Literal["skip", "stop"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MIN_CACHED_TEXTS = 256


class Embedder:
    """Runs both towers of a CLIP-like model over data sets and texts.

    Args:
        model: has `encode_image(x, normalize=True)` and `encode_text(ids, normalize=True)`, as ours and open_clip's.
        preprocess: converts a PIL image to float32 (3, H, W).
        tokenizer: converts a list of n texts to int64 (n, L).
        precision: number format of the towers, by autocast. The embeddings are float32 in any case. auto: bf16 if the
            device multiplies it in hardware, else fp32. The attribute `precision` holds the choice.
        num_workers: threads that decode and preprocess images.
        progress: show a progress bar on stderr for work of more than one batch.
        image_conversion: how files become images, see `data.image_files.read_rgb`.
        on_bad_image: stop: an image that cannot be decoded is an error. skip: its embedding is NaN, and `readable`
            leaves it out.
        cache: embeddings of earlier evaluations. None: keep embeddings only in memory.
        cache_dtype: number format of cached embeddings. The first use rounds them too, so that a second evaluation
            gives the same scores.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        *,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        batch_size: int = 64,
        num_workers: int = 2,
        progress: bool = False,
        image_conversion: ImageConversion = "standard",
        on_bad_image: OnBadImage = "stop",
        cache: EmbeddingCache | None = None,
        cache_dtype: CacheDtype = "fp32",
    ) -> None:
        """Check the settings. Raises UserError."""
        self.model: Any = model  # nn.Module's attributes are not typed as callable
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.device = torch.device(device)
        if precision not in ("auto", "fp32", *_DTYPES):
            raise UserError(f"precision {precision!r} is unknown; use auto, fp32, bf16 or fp16")
        if precision == "auto":
            precision, reason = native_precision(self.device)
            log.info("precision auto: %s, because %s", precision, reason)
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
        if batch_size < 1 or num_workers < 1:
            raise UserError(f"batch_size={batch_size} and num_workers={num_workers} must be at least 1")
        if image_conversion not in ("standard", "open_clip") or on_bad_image not in ("skip", "stop"):
            raise UserError(
                f"image_conversion={image_conversion!r} must be standard or open_clip, "
                f"and on_bad_image={on_bad_image!r} skip or stop"
            )
        self.image_conversion, self.on_bad_image = image_conversion, on_bad_image
        if image_conversion == "open_clip" and isinstance(preprocess, Preprocess):
            self.preprocess = Preprocess(dataclasses.replace(preprocess.config, conversion="open_clip"))
        self.precision, self.batch_size, self.num_workers, self.progress = precision, batch_size, num_workers, progress
        self.cache, self.cache_dtype = cache or EmbeddingCache(None), cache_dtype
        self._in_memory: dict[tuple[str, ...], Tensor] = {}
        settings = image_conversion, precision, self.device.type, cache_dtype
        self._key = EmbeddingKey(self.model, self.preprocess, tokenizer, self._call, self.device, *settings)

    def images(self, data: EvalDataset) -> Tensor:
        """Embed all images of a data set: (N, D) float32 on the device, unit norm, in the order of the samples.

        Raises:
            UserError: a damaged image, unless `on_bad_image` is skip, or an embedding that is not finite. The message
                names the sample.
        """
        if isinstance(data, SubsetDataset):
            return self.images(data.base)[data.rows]
        memory = "images", data.fingerprint
        if memory not in self._in_memory:
            self._key.check_preprocess()
            kinds: dict[int, spot_check.Kind] = {}

            def compute() -> tuple[Tensor, list[spot_check.Kind]]:
                rows = self.uncached_images(data, kinds)
                return rows, [kinds.get(i, spot_check.UNREADABLE) for i in range(len(data))]

            def compute_some(rows: list[int]) -> Tensor:
                return self.uncached_images(SubsetDataset(data, rows))

            rows = self._kept(lambda: self._key.images(data.fingerprint), len(data), compute, compute_some, data.key)
            self._in_memory[memory] = self._with_readable(data, rows)
        return self._in_memory[memory]

    def _with_readable(self, data: EvalDataset, rows: Tensor) -> Tensor:
        """Embed the images that an earlier evaluation skipped if they can be decoded now, for example with pydicom.

        Raises the errors of `images`.
        """
        if skipped := _not_finite(rows):
            rows = rows.clone()
        for i in skipped:
            image = self.read(data, i) if self.on_bad_image == "stop" else self._try_to_read(data, i)
            if not isinstance(image, UserError):
                row = self._embed_one(image, data.key(i))
                rows[i] = F.normalize(row.to(FORMATS[self.cache_dtype]).float(), dim=1)[0]
        return rows

    def readable(self, data: EvalDataset, rows: Tensor | None = None) -> tuple[EvalDataset, dict[str, str]]:
        """Return the samples whose images can be decoded, and the reason of every other one by its key.

        rows: embeddings of `data` by `uncached_images`. None: try to decode every image.

        Raises:
            UserError: no image can be decoded.
        """
        if self.on_bad_image == "stop":
            return data, {}
        reasons = self.reasons(data, range(len(data)) if rows is None else _not_finite(rows))
        if len(reasons) == len(data):
            raise UserError(f"none of {len(data)} images can be decoded; the first one: {reasons[0]}")
        kept = [i for i in range(len(data)) if i not in reasons]
        return SubsetDataset(data, kept) if reasons else data, {data.key(i): reasons[i] for i in reasons}

    def reasons(self, data: EvalDataset, suspects: Sequence[int]) -> dict[int, str]:
        """Try to decode these samples. Return the reason of every one whose image cannot be decoded, by its number."""
        with ThreadPoolExecutor(self.num_workers) as pool:
            results = pool.map(lambda i: self._try_to_read(data, i), suspects)
            errors = zip(suspects, results, strict=True)
            return {i: str(error) for i, error in errors if isinstance(error, UserError)}

    def read(self, data: EvalDataset, i: int, kinds: dict[int, spot_check.Kind] | None = None) -> Tensor:
        """Decode and preprocess one image: float32 (3, H, W). Raises UserError, which names the sample.

        kinds: gets the image's kind.
        """
        content = data.image(i)
        if kinds is not None:
            kinds[i] = spot_check.kind_of_image(content)
        image = read_rgb(content, lambda: image_name(data, i), self.image_conversion)
        try:
            return self.preprocess(image)
        except UserError as error:
            raise UserError(f"image {image_name(data, i)}: {error}") from error

    def _try_to_read(
        self, data: EvalDataset, i: int, kinds: dict[int, spot_check.Kind] | None = None
    ) -> Tensor | UserError:
        try:
            return self.read(data, i, kinds)
        except UserError as error:
            return error

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: (n, D) float32 on the device, unit norm.

        Raises:
            UserError: an embedding that is not finite. The message names the text.
        """
        if len(texts) < _MIN_CACHED_TEXTS:  # embedding a few prompts takes less time than a look-up
            return self._embed_texts(texts)
        digest = digest_of_texts(texts)
        if (memory := ("texts", digest)) not in self._in_memory:

            def compute() -> tuple[Tensor, list[spot_check.Kind]]:
                return self._embed_texts(texts), list(map(spot_check.kind_of_text, texts))

            self._in_memory[memory] = self._kept(
                lambda: self._key.texts(texts, digest), len(texts), compute,
                lambda rows: self._embed_texts([texts[row] for row in rows]), lambda i: repr(texts[i][:60]),
            )  # fmt: skip
        return self._in_memory[memory]

    def _kept(
        self,
        key: Callable[[], tuple[str, ...]],
        num: int,
        all_rows: Callable[[], tuple[Tensor, list[spot_check.Kind]]],
        some_rows: Callable[[list[int]], Tensor],
        name: Callable[[int], str],
    ) -> Tensor:
        """Return the embeddings of the cache, or compute them: (num, D) float32 on the device, unit norm."""
        dtype = FORMATS[self.cache_dtype]
        if self.cache.folder is None:
            rows = all_rows()[0].to(dtype)
        else:
            tolerance = spot_check.tolerance(self.precision, self.cache_dtype, self.device)
            rows = self.cache.get_or_compute(key(), Computation(num, all_rows, some_rows, name, dtype, tolerance))
        rows = rows.to(self.device, torch.float32)
        return rows if dtype == torch.float32 else F.normalize(rows, dim=1)

    def _call(self) -> None:
        """Embed an image and a text of no data set."""
        from PIL import Image

        self._embed_one(self.preprocess(Image.new("RGB", (64, 48), (200, 90, 40))), "probe")
        self._embed_texts([new_text()])

    def image_key(self, data_fingerprint: str) -> tuple[str, ...]:
        """Return the key of a data set's embeddings: equal keys mean equal embeddings, apart from rounding."""
        return self._key.images(data_fingerprint)

    def uncached_images(
        self,
        data: EvalDataset,
        kinds: dict[int, spot_check.Kind] | None = None,
        advance: Advance | None = None,
    ) -> Tensor:
        """Embed all images of a data set as `images` does, without reading or writing the cache.

        kinds: gets the kind of each image by its number. advance: counts the images in place of a progress bar.
        """

        def load(i: int) -> Tensor | UserError:
            return self.read(data, i, kinds) if self.on_bad_image == "stop" else self._try_to_read(data, i, kinds)

        with ThreadPoolExecutor(self.num_workers) as pool:
            starts = range(0, len(data), self.batch_size)
            spans = (range(start, min(start + self.batch_size, len(data))) for start in starts)
            batches = _prefetch(pool, load, spans)
            return self._run(batches, self._encode_images, len(data), "images", data.key, advance)

    def image(self, content: bytes, name: str) -> Tensor:
        """Embed one encoded image: (1, D) float32 on the device, unit norm. Raises the errors of `images`, which call
        it `name`."""
        return self._embed_one(self.preprocess(read_rgb(content, lambda: name, self.image_conversion)), name)

    def _embed_one(self, pixels: Tensor, name: str) -> Tensor:
        return self._run(iter([[pixels]]), self._encode_images, 1, "images", lambda _: name)

    def _encode_images(self, batch: list[Tensor | UserError]) -> Tensor:
        # A skipped image is embedded as a blank one, so that every batch has the same shape.
        pixels = [self._blank if isinstance(image, UserError) else image for image in batch]
        return self.model.encode_image(torch.stack(pixels).to(self.device), normalize=True)

    @functools.cached_property
    def _blank(self) -> Tensor:
        from PIL import Image

        return self.preprocess(Image.new("RGB", (256, 256)))

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        def encode(batch: list[str]) -> Tensor:
            return self.model.encode_text(self.tokenizer(batch).to(self.device), normalize=True)

        starts = range(0, len(texts), self.batch_size)
        batches = (list(texts[start : start + self.batch_size]) for start in starts)
        return self._run(batches, encode, len(texts), "texts", lambda i: repr(texts[i][:60]))

    def _run(
        self,
        batches: Iterator[list[Any]],
        encode: Callable[[list[Any]], Tensor],
        total: int,
        unit: str,
        name: Callable[[int], str],
        advance: Advance | None = None,
    ) -> Tensor:
        rows: list[Tensor] = []
        num_done = 0
        show = self.progress and total > self.batch_size
        bar = contextlib.nullcontext(advance) if advance else track(f"embed {unit}", total, show=show)
        with _evaluation_mode(self.model), torch.inference_mode(), self.autocast(), bar as advance:
            for batch in batches:
                embeddings = encode(batch).float()
                not_finite = (~torch.isfinite(embeddings).all(1)).nonzero()
                if len(not_finite):
                    raise UserError(
                        f"the model's embedding of {name(num_done + int(not_finite[0]))} holds NaN or infinity: "
                        "the weights are damaged or the precision is too low"
                    )
                embeddings = F.normalize(embeddings, dim=1)
                skipped = [i for i, item in enumerate(batch) if isinstance(item, UserError)]
                embeddings[skipped] = torch.nan
                rows.append(embeddings)
                num_done += len(batch)
                advance(len(batch))
        if not rows:
            raise UserError(f"the data hold no {unit} to embed")
        return torch.cat(rows)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the towers compute in the configured precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])


def log_skipped(reasons: dict[str, str], num_skipped: int, total: int) -> None:
    """Log the skipped images with their reasons, at most 20 of them. Samples may share an image."""
    if reasons:
        shown = [f"  {reason}" for reason in list(reasons.values())[:20]]
        shown += [f"  and {len(reasons) - 20} more"] if len(reasons) > 20 else []
        log.warning("skipped %d of %d images, which cannot be decoded:\n%s", num_skipped, total, "\n".join(shown))


def _not_finite(rows: Tensor) -> list[int]:
    return (~torch.isfinite(rows).all(1)).nonzero().ravel().tolist()  # type: ignore[no-any-return]


def _prefetch(pool: ThreadPoolExecutor, load: Callable[[int], Any], spans: Iterator[range]) -> Iterator[list[Any]]:
    """Yield batches of loaded images, and load exactly one batch ahead of the caller."""
    pending = None
    for span in spans:
        futures = [pool.submit(load, i) for i in span]
        if pending is not None:
            yield [future.result() for future in pending]
        pending = futures
    if pending is not None:
        yield [future.result() for future in pending]


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
