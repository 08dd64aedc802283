"""A tiny model in the place of the published one, for tests of README and of the tutorials."""

from __future__ import annotations

from pathlib import Path

import torch

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.text import TextConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig

HUB_NAME = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
CONFIG = BiomedClipConfig(
    vision=VisionConfig(patch_size=56, width=32, layers=1, heads=2),
    text=TextConfig(vocab_size=64, width=32, layers=1, heads=2, max_positions=256),
)


def write_hub_model(folder: Path) -> Path:
    """Write a model with the published input size, context length and embedding, but tiny towers of random weights."""
    torch.manual_seed(0)
    words = Tokenizer.train(["this is a photo of a chest X-ray"] * 3, CONFIG.text.vocab_size)
    pretrained.save(folder, BiomedClip(CONFIG), Preprocess(PreprocessConfig(size=224)), words)
    return folder


def download_from(folder: Path):
    """Return a function that takes the place of `huggingface_hub.hf_hub_download`, for HUB_NAME only."""
    from huggingface_hub.errors import EntryNotFoundError

    def download(repository: str, name: str, **_: object) -> str:
        assert repository == HUB_NAME
        if not (folder / name).is_file():
            raise EntryNotFoundError(name)
        return str(folder / name)

    return download
