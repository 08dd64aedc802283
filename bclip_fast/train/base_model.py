"""The model from which a fine-tuning starts, described by its content. A resumed run must start from the same one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from bclip_fast.data.transform import Preprocess
from bclip_fast.io.hashing import sha256
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer


def describe(clip: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Configurations of model and preprocessing, and SHA-256 of the weights and of the tokenizer, as JSON.

    Args:
        texts: some texts whose tokens count, too.
    """
    digest = hashlib.sha256()
    for name, tensor in clip.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    vocabulary = sorted(tokenizer.fast.get_vocab().items())
    content = {
        "config": dataclasses.asdict(clip.config),
        "preprocess": dataclasses.asdict(preprocess.config),
        "tokenizer": sha256(json.dumps([vocabulary, tokenizer.encode(list(texts))])),
        "weights": digest.hexdigest(),
    }
    described: dict[str, Any] = json.loads(json.dumps(content))
    return described
