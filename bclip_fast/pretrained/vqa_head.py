"""Save and load the question answering head of a run. Its files are in vqa/, next to the towers in model/."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bclip_fast import pretrained
from bclip_fast.errors import UserError, first_line
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import replacing_files, settle, write_text
from bclip_fast.model.meter import MeterConfig, VqaModel


def is_run(folder: Path) -> bool:
    """Return whether the folder is a run of `bclip finetune` on questions."""
    settle(folder / "vqa")
    return (folder / "vqa" / "vqa.json").is_file()


def save(folder: Path, model: VqaModel, state: dict[str, torch.Tensor]) -> None:
    """Write vqa/vqa.json and vqa/head.safetensors into a run folder.

    state: state of the complete model. The file holds only the tensors outside the towers.
    """
    from safetensors.torch import save_file

    head = {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith("clip.")}
    content = {
        "meter": asdict(model.meter_config),
        "answers": list(model.answers),
        "common_answers": list(getattr(model, "common_answers", ("", "yes"))),
    }
    with replacing_files(folder / "vqa") as partial:
        save_file(head, partial / "head.safetensors")
        write_text(partial / "vqa.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path, device: str | torch.device = "cpu") -> tuple[VqaModel, Any, Any]:
    """Load (model, preprocess, tokenizer) of a run of `bclip finetune` on questions.

    Raises:
        UserError: a file is missing or damaged, or the files do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    clip, preprocess, tokenizer = pretrained.load(folder, device=device)
    settle(folder / "vqa")
    try:
        content = json.loads((folder / "vqa" / "vqa.json").read_text(encoding="utf-8"))
        model = VqaModel(clip, MeterConfig(**content["meter"]), tuple(content["answers"]))
        head = load_file(folder / "vqa" / "head.safetensors")
        missing, unexpected = model.load_state_dict(head, strict=False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        for name in ("vqa.json", "head.safetensors"):
            stand_ins.refuse(folder / "vqa" / name)
        raise UserError(f"{folder / 'vqa'} is damaged: {first_line(error)}") from error
    if unexpected or any(not name.startswith("clip.") for name in missing):
        raise UserError(
            f"{folder / 'vqa' / 'head.safetensors'} does not fit vqa.json, first at {[*unexpected, *missing][0]}"
        )
    model.common_answers = tuple(content["common_answers"])  # type: ignore[assignment]
    return model.to(device).eval(), preprocess, tokenizer
