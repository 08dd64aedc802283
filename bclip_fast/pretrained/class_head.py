"""Save and load the class head of a run. Its files are in classifier/, next to the towers in model/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bclip_fast.errors import UserError, first_line
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import replacing_files, settle, write_text
from bclip_fast.model.image_classifier import ClassHead

FOLDER = "classifier"
_FILES = ("classes.json", "head.safetensors")


def is_run(folder: Path) -> bool:
    """Return whether the folder is a run of `bclip finetune --task classification`."""
    settle(folder / FOLDER)
    return (folder / FOLDER / _FILES[0]).is_file()


def save(folder: Path, head: ClassHead) -> None:
    """Write classifier/classes.json and classifier/head.safetensors into a run folder."""
    from safetensors.torch import save_file

    content = {"classes": list(head.names), "multi_label": head.multi_label, "label": head.label}
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in head.state_dict().items()}
    with replacing_files(folder / FOLDER) as partial:
        save_file(state, partial / _FILES[1])
        write_text(partial / _FILES[0], json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path, dim: int) -> ClassHead:
    """Load the head of a run.

    Args:
        dim: number of components of the model's embeddings.

    Raises:
        UserError: a file is missing or damaged, or the head is for embeddings of another size.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settle(folder / FOLDER)
    try:
        content: dict[str, Any] = json.loads((folder / FOLDER / _FILES[0]).read_text(encoding="utf-8"))
        names = content["classes"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("classes.json must have a list of names in `classes`")
        head = ClassHead(names, bool(content["multi_label"]), dim, str(content["label"]))
        head.load_state_dict(load_file(folder / FOLDER / _FILES[1]))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in head.state_dict().values()):
            raise ValueError("head.safetensors holds NaN or infinity")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        for name in _FILES:
            stand_ins.refuse(folder / FOLDER / name)
        raise UserError(f"{folder / FOLDER} is damaged: {first_line(error)}") from error
    return head.eval()
