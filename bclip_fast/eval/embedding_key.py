"""The key of kept embeddings: everything that decides them.

The key covers the data, the model, the preprocessing or the tokenizer, and the number formats. It also covers the
package's rules and code, the versions of other packages, and the kernels that run. `identity` reads the objects.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import secrets
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bclip_fast.data.image_files import RULES
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256, sha256_of_parts, sha256_of_sources
from bclip_fast.ops import dispatch, tuning
from bclip_fast.ops.fingerprint import fingerprint

from . import identity

PROBE_TEXT = "Chest X-ray, \u03b1-SMA \u00d7400; p<0.05 (A\u2013C)."
"""A text that two tokenizers rarely split in the same way."""
# Packages that decode images and split texts, apart from those of the model.
_PACKAGES = ("torch", "numpy", "pillow", "pydicom", "tokenizers", "ftfy")
_SOURCES = ("data", "model", "ops", "eval/embed.py")
# Packages whose objects calls do not change. Others may count calls or keep results. The key leaves such state out.
_STATELESS = {
    "bclip_fast", "torch", "numpy", "PIL", "tokenizers", "builtins", "collections", "copyreg", "functools", "types",
}  # fmt: skip


class EmbeddingKey:
    """Parts of the keys of one model's embeddings. Each object is read when a key first needs it.

    Args:
        model, preprocess, tokenizer: as for `Embedder`.
        call_model: embeds an image and a text. It tells what calls change in the model.
        settings: other settings that decide an embedding.
    """

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Any], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        call_model: Callable[[], object],
        device: torch.device,
        *settings: str,
    ) -> None:
        """Store the objects."""
        self._model, self._preprocess, self._tokenizer, self._call_model = model, preprocess, tokenizer, call_model
        self._device, self._settings = device, settings

    def images(self, data_fingerprint: str) -> tuple[str, ...]:
        """Return the key of a data set's images. data_fingerprint: hash of the images. Raises UserError as
        `check_preprocess` does."""
        return "images", data_fingerprint, self._of_model, self._of_preprocess, str(RULES), *self._settings

    def texts(self, texts: Sequence[str], digest: str) -> tuple[str, ...]:
        """Return the key of texts. digest: their `digest_of_texts`."""
        ids = self._tokenizer([*texts[:16], *texts[-16:], PROBE_TEXT])
        behaviour = sha256(ids.contiguous().numpy().tobytes())
        return "texts", digest, behaviour, self._of_model, self._of_tokenizer, *self._settings

    def check_preprocess(self) -> None:
        """Raise UserError if `preprocess` augments."""
        _ = self._of_preprocess

    @functools.cached_property
    def _of_model(self) -> str:
        facts, packages = _lasting_facts("model", self._model, functools.partial(_without_result, self._call_model))
        return identity.digest(facts | packages | environment(self._device))

    @functools.cached_property
    def _of_preprocess(self) -> str:
        results = []

        def call() -> None:
            results.append(_run_probes(self._preprocess))
            if results[0] != results[-1]:
                raise UserError(
                    "preprocess gives two results for one image; evaluate with a preprocess that does not augment"
                )

        facts, packages = _lasting_facts("preprocess", self._preprocess, call)
        return identity.digest(facts | packages | {"results": "".join(results[:1])})

    @functools.cached_property
    def _of_tokenizer(self) -> str:
        # open_clip's tokenizer has a memo of words.
        call = functools.partial(_without_result, lambda: self._tokenizer([new_text()]))
        facts, packages = _lasting_facts("tokenizer", self._tokenizer, call)
        return identity.digest(facts | packages)


def digest_of_texts(texts: Sequence[str]) -> str:
    """Return the SHA-256 of the texts in their order."""
    return sha256_of_parts(bytes.fromhex(sha256(text.encode(errors="surrogatepass"))) for text in texts)


def environment(device: torch.device) -> dict[str, str]:
    """Return the versions, settings and kernels that decide how a device computes. They do not name the machine."""
    kernels = fingerprint(device.type, device.index or 0) if device.type in ("cpu", "cuda") else {"device": device.type}
    orders = {key: entry.order for key, entry in tuning.of_device(device.type, device.index or 0).entries.items()}
    return {
        **{name: value for name, value in kernels.items() if name not in ("name", "threads", "driver")},
        **_versions(),
        "sources": sha256_of_sources(*_SOURCES),
        "backends": f"{dispatch.requested()} {sorted(orders.items(), key=str)}",
        "float32": f"{torch.get_float32_matmul_precision()} {torch.backends.cudnn.allow_tf32} "
        f"{torch.backends.mkldnn.enabled} {torch.get_default_dtype()}",
    }


def _lasting_facts(name: str, value: Any, call: Callable[[], object]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the facts of an object that calls do not change, and the versions of its packages."""
    reader = identity.Reader()
    facts = reader.read(**{name: value})
    if reader.has_own_code or not reader.packages.keys() <= _STATELESS:
        call()  # it may create state that all later calls find
        facts = reader.read(**{name: value})
        call()
        facts = identity.unchanged(facts, reader.read(**{name: value}))
    return facts, {f"package {package}": version for package, version in reader.packages.items()}


def _without_result(call: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):  # the call that embeds raises it again
        call()


def new_text() -> str:
    """Return a text with a word that no call has had, which a memo keeps."""
    return f"{PROBE_TEXT} {''.join(secrets.choice(string.ascii_lowercase) for _ in range(12))}"


def _run_probes(preprocess: Callable[[Any], Tensor]) -> str:
    """Return the SHA-256 of the results for three probe images."""
    from PIL import Image

    generator = np.random.default_rng(0)
    probes = [generator.integers(0, 256, shape, dtype=np.uint8) for shape in ((61, 97, 3), (480, 640, 3), (300, 200))]
    results = (preprocess(Image.fromarray(np.ascontiguousarray(probe))).contiguous() for probe in probes)
    return sha256_of_parts(
        f"{tuple(result.shape)} {result.dtype}".encode() + result.view(torch.uint8).numpy().tobytes()
        for result in results
    )


@functools.cache
def _versions() -> dict[str, str]:
    from PIL import features

    versions = {"python": platform.python_version(), "jpeg": str(features.version("jpg"))}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[f"package {name}"] = importlib.metadata.version(name)
    return versions
