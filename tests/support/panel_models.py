"""Tiny DAB-DETRs with random weights, or with boxes that don't depend on the image."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bclip_fast.benchmarks import peers

SIZES = {
    "hidden_size": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_labels": 1,
}  # fmt: skip
PREPROCESSING = {
    "do_resize": True, "size": {"shortest_edge": 96, "longest_edge": 160}, "do_rescale": True, "do_normalize": True,
    "image_processor_type": "ConditionalDetrImageProcessor",
}  # fmt: skip

# The boxes of a left and a right panel, for `write_fixed_model`.
HALVES = ((0.25, 0.5, 0.5, 1.0), (0.75, 0.5, 0.5, 1.0))


def tiny_model(seed: int = 0, backbone: Any = None, **changes: Any) -> Any:
    """Return a DabDetrForObjectDetection with random weights. backbone: configuration. None: a ResNet of 4 layers."""
    # transformers needs none, but fails to import one that was built for another torch.
    with contextlib.suppress(ImportError):
        peers.import_torchvision()
    from transformers import DabDetrConfig, DabDetrForObjectDetection, ResNetConfig

    small = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
    torch.manual_seed(seed)
    options = {"backbone_config": ResNetConfig(**small)} if backbone is None else backbone
    model = DabDetrForObjectDetection(DabDetrConfig(**{**SIZES, "num_queries": 8, **options, **changes})).eval()
    for name, buffer in model.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 2)
        elif "running_mean" in name:
            buffer.normal_(0, 0.2)
    return model


def write_model(folder: Path, model: Any) -> Path:
    """Write a model as transformers does, with the configuration of its image processor."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


def write_fixed_model(folder: Path, boxes: Sequence[tuple[float, float, float, float]]) -> Path:
    """Write a model that finds these boxes in each image: middle x, middle y, width and height as shares."""
    model = tiny_model(num_queries=len(boxes))
    with torch.no_grad():
        model.class_embed.weight.zero_()
        model.class_embed.bias.fill_(3.0)
        model.bbox_predictor.layers[-1].weight.zero_()
        model.bbox_predictor.layers[-1].bias.zero_()
        model.model.query_refpoint_embeddings.weight.copy_(torch.logit(torch.tensor(boxes)))
    return write_model(folder, model)
