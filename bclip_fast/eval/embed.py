"""A model and data in, L2-normalised float32 embedding matrices out."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import open_image
from ..errors import UserError
from ..io.progress import track
from ..ops.processor import native_precision
from . import embedding_cache as cache
from .datasets import EvalDataset
from .embedding_cache import Cache

log = logging.getLogger(__name__)

Format = Literal["fp32", "bf16", "fp16"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Embedder:
    """Runs both towers of any CLIP-like model over data sets and texts.

    Args:
        model: has `encode_image(x, normalize=True)` and `encode_text(ids, normalize=True)`: ours or open_clip's.
        preprocess: PIL image to float32 (3, H, W).
        tokenizer: list of n texts to int64 (n, L).
        precision: bf16 and fp16 run the towers under autocast; embeddings come back as float32 in any case. auto: bf16
            where the device multiplies it in hardware, else fp32; the attribute `precision` is the one taken.
        num_workers: threads that decode and preprocess images.
        progress: show a bar on stderr for what takes more than one batch.
        cache: where embeddings are kept from one evaluation to the next; None: in memory alone.
        keep: the format in which they are kept; what was rounded is used rounded at once, so a second run is equal.
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
        cache: Cache | None = None,
        keep: Format = "fp32",
    ) -> None:
        self.model: Any = model  # nn.Module's attributes are not typed as callable
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.device = torch.device(device)
        if precision not in ("auto", "fp32", *_DTYPES):
            raise UserError(f"precision {precision!r} is unknown: use auto, fp32, bf16 or fp16")
        if precision == "auto":
            precision, reason = native_precision(self.device)
            log.info("precision auto: %s, because %s", precision, reason)
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("precision fp16 needs a GPU: use bf16 or fp32 on the CPU")
        if batch_size < 1 or num_workers < 1:
            raise UserError(f"batch_size ({batch_size}) and num_workers ({num_workers}) must be at least 1")
        self.precision, self.batch_size, self.num_workers, self.progress = precision, batch_size, num_workers, progress
        self.cache, self.keep = cache or Cache(None), keep
        self._known: dict[tuple[str, ...], Tensor] = {}

    def images(self, data: EvalDataset) -> Tensor:
        """(N, D) float32 on the device, unit norm, row i of sample i.

        Raises:
            UserError: an image that cannot be decoded, an embedding that is not finite; both name the sample.
        """

        return self._kept(("images", data.fingerprint, self._preprocess), lambda: self.uncached_images(data))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, D) float32 on the device, unit norm. Raises UserError naming a text whose embedding is not finite."""
        if len(texts) < 256:  # prompts: sooner computed than looked up
            return self._texts(texts)
        return self._kept(("texts", cache.of_texts(texts, self.tokenizer)), lambda: self._texts(texts))

    def _kept(self, parts: tuple[str, ...], compute: Callable[[], Tensor]) -> Tensor:
        if parts not in self._known:
            dtype = cache.FORMATS[self.keep]
            if self.cache.folder is None:
                rows = compute().to(dtype)
            else:
                name = (self._weights, *parts, self.precision, self.device.type, self.keep)
                rows = self.cache.get(name, lambda: compute().to(dtype))
            rows = rows.to(self.device, torch.float32)
            self._known[parts] = rows if dtype == torch.float32 else F.normalize(rows, dim=1)
        return self._known[parts]

    @functools.cached_property
    def _weights(self) -> str:
        return cache.of_weights(self.model)

    @functools.cached_property
    def _preprocess(self) -> str:
        return cache.of_preprocess(self.preprocess)

    def uncached_images(self, data: EvalDataset) -> Tensor:
        """Embed every image of the data, as `images` does, without reading or writing the cache."""

        def load(i: int) -> Tensor:
            return self.preprocess(open_image(data.image(i), lambda: data.key(i)))

        with ThreadPoolExecutor(self.num_workers) as pool:
            starts = range(0, len(data), self.batch_size)
            spans = (range(start, min(start + self.batch_size, len(data))) for start in starts)
            batches = _ahead(pool, load, spans)
            return self._run(batches, self._encode_images, len(data), "images", data.key)

    def picture(self, content: bytes, name: str) -> Tensor:
        """(1, D) float32 on the device, unit norm, of one encoded picture; raises as `images` does, saying `name`."""
        image = self.preprocess(open_image(content, lambda: name))
        return self._run(iter([[image]]), self._encode_images, 1, "images", lambda i: name)

    def _encode_images(self, batch: list[Tensor]) -> Tensor:
        return self.model.encode_image(torch.stack(batch).to(self.device), normalize=True)

    def _texts(self, texts: Sequence[str]) -> Tensor:
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
        what: str,
        name: Callable[[int], str],
    ) -> Tensor:
        rows: list[Tensor] = []
        done = 0
        show = self.progress and total > self.batch_size
        with (
            _evaluating(self.model),
            torch.inference_mode(),
            self.autocast(),
            track(f"embed {what}", total, show=show) as advance,
        ):
            for batch in batches:
                embeddings = encode(batch).float()
                bad = (~torch.isfinite(embeddings).all(1)).nonzero()
                if len(bad):
                    raise UserError(
                        f"the model's embedding of {name(done + int(bad[0]))} holds NaN or infinity: "
                        "the weights are broken or the precision is too low"
                    )
                rows.append(F.normalize(embeddings, dim=1))
                done += len(batch)
                advance(len(batch))
        if not rows:
            raise UserError(f"there are no {what} to embed")
        return torch.cat(rows)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the towers compute in the configured precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])


def _ahead(pool: ThreadPoolExecutor, load: Callable[[int], Tensor], spans: Iterator[range]) -> Iterator[list[Tensor]]:
    """Batches of loaded images; the next batch loads while the caller uses this one, and no more than that."""
    waiting = None
    for span in spans:
        futures = [pool.submit(load, i) for i in span]
        if waiting is not None:
            yield [future.result() for future in waiting]
        waiting = futures
    if waiting is not None:
        yield [future.result() for future in waiting]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
