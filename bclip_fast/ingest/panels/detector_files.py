"""The files of a panel detector, from a folder or from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from bclip_fast.errors import UserError
from bclip_fast.io.json_files import read_object

MODEL_TYPE = "dab-detr"
FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


def model_files(name: str) -> dict[str, Path]:
    """Return the files of a detector by name. Downloads those of a model of the hub, unless they are cached.

    Args:
        name: hf-hub:ORG/NAME[@REVISION], or a folder.

    Raises:
        UserError: a file is missing, cannot be downloaded, or configures another kind of model.
    """
    from bclip_fast.pretrained.sources import HUB_PREFIX, Folder, Hub, Source

    if name.startswith(HUB_PREFIX):
        source: Source = Hub(name.removeprefix(HUB_PREFIX))
    elif Path(name).is_dir():
        source = Folder(Path(name))
    else:
        raise UserError(f"panel_model={name} is not a folder; for a model of the hub, use hf-hub:ORG/NAME")
    files = {}
    for file in FILES:
        try:
            files[file] = source.get([file])
        except UserError as error:
            hint = "; weights in pickle files (pytorch_model.bin) are not read" if file == FILES[-1] else ""
            offline = "; without a network, download it elsewhere (`hf download`) and give its folder"
            hint += offline if name.startswith(HUB_PREFIX) else ""
            raise UserError(f"panel_model={name}: {error}{hint}") from error
    kind = read_object(files[FILES[0]]).get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(
            f"panel_model={name} is a model of type {str(kind)[:40]!r}; give a {MODEL_TYPE} of transformers"
        )
    return files
