"""Edit the files of a checkpoint, for tests of loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PUBMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"


BERT_BASE = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
}


WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Apply `change` to the JSON object in a file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    """Apply `change` to the tensors of a checkpoint."""
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def convert_to_bin(folder: Path, wrap: Callable[[dict], object] = lambda state: state) -> Path:
    """Replace the weights by a .bin file with `wrap(state)`. Return its path."""
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(wrap(load_file(folder / WEIGHTS)), path)
    (folder / WEIGHTS).unlink()
    return path


def in_model(key: str, value: object) -> Callable[[dict], None]:
    """Return a function that sets a key of `model_cfg`."""
    return lambda content: content["model_cfg"].update({key: value})


def in_section(section: str, key: str, value: object) -> Callable[[dict], None]:
    """Return a function that sets a key of a section of `model_cfg`."""
    return lambda content: content["model_cfg"][section].update({key: value})
