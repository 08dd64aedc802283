"""Load a model from any supported source by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bclip_fast import pretrained
from bclip_fast.errors import UserError, first_line
from bclip_fast.io import stand_ins

from . import class_head, vqa_head

Model = str | tuple[nn.Module, Callable[[Any], Tensor], Callable[[list[str]], Tensor]]
"""Name of a model, or (model, preprocess, tokenizer)."""


def load_model(name: str, device: str | torch.device = "cpu") -> tuple[nn.Module, Any, Any]:
    """Load (model, preprocess, tokenizer).

    Args:
        name: a run folder, a folder in open_clip's layout, hf-hub:ID, a short name such as `medpmc` or `bmc=FOLDER`
            (`named_models`), or open_clip:ARCHITECTURE/PRETRAINED. open_clip
            downloads the latter, but PRETRAINED may also be a file. The model of a run on questions includes its head.
            That of a run on classes has its head as `classifier`.

    Raises:
        UserError: an unknown name, or files that are missing or damaged.
    """
    if name.startswith("open_clip:"):
        import open_clip

        architecture, _, weights = name.removeprefix("open_clip:").partition("/")
        if architecture not in open_clip.list_models() or not weights:
            raise UserError(f"{name}: use open_clip:ARCHITECTURE/PRETRAINED with an architecture that open_clip lists")
        # open_clip only warns, and then computes with another activation than the weights were trained with.
        trained_with = open_clip.pretrained.get_pretrained_cfg(architecture, weights)
        quick = (open_clip.get_model_config(architecture) or {}).get("quick_gelu", False)
        if trained_with and trained_with.get("quick_gelu", False) != quick:
            other = architecture.removesuffix("-quickgelu") if quick else f"{architecture}-quickgelu"
            raise UserError(
                f"{name}: {weights} was trained with{'out' if quick else ''} QuickGELU, and {architecture} has "
                f"{'it' if quick else 'exact GELU'}; use open_clip:{other}/{weights}"
            )
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=weights, device=device
            )
        except Exception as error:  # torch's unpickler may raise any exception for a damaged file
            stand_ins.refuse(Path(weights))
            raise UserError(f"{name}: open_clip cannot load {weights}: {first_line(error)}") from error
        return model.eval(), preprocess, open_clip.get_tokenizer(architecture)
    if vqa_head.is_run(Path(name)):
        return vqa_head.load(Path(name), device)
    model, preprocess, tokenizer = pretrained.load(name, device=device)
    if class_head.is_run(Path(name)):
        model.classifier = class_head.load(Path(name), model.config.embed_dim).to(device)
    return model, preprocess, tokenizer
