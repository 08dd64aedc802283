"""The models of medpmc-clip-eval by short names, such as `medpmc` or `bmc=FOLDER`.

Each has its repository on the hub, or a local folder with the same files. All of them have layouts that `layouts`
reads. Two repositories name their weights in their own way or may lack a configuration, which then is that of
open_clip's ViT-L-14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bclip_fast.errors import UserError
from bclip_fast.model.open_clip_sections import CONFIG_FILE

from .sources import TRANSFORMERS_CONFIG, Folder, Hub, Source

_VIT_L_14 = Path(__file__).parent / "vit_l_14.json"


@dataclass(frozen=True)
class NamedModel:
    """A published model.

    Attributes:
        title: name in tables.
        repository: ORG/NAME on the hub.
        weights: file of the weights, if its name is not the layout's.
        config: open_clip_config.json in place of the one that the repository may lack.
    """

    title: str
    repository: str
    weights: str = ""
    config: Path | None = None


NAMES = {
    "medpmc": NamedModel("MedPMC-CLIP", "Yale-BIDS-Chen/medpmc-clip-l-14_jun24_v1", config=_VIT_L_14),
    "bmc": NamedModel("BMC-CLIP", "BIOMEDICA/BMC_CLIP_CF", "BMC_CLIP_CF.pt", _VIT_L_14),
    "biomedclip": NamedModel("BiomedCLIP", "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"),
    "pmc": NamedModel("PMC-CLIP", "ryanyip7777/pmc_vit_l_14"),
    "openclip": NamedModel(
        "OpenCLIP ViT-L-14, CommonPool", "laion/CLIP-ViT-L-14-CommonPool.XL.clip-s13B-b90K", config=_VIT_L_14
    ),
    "coca": NamedModel("CoCa ViT-L-14", "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k"),
    "medsiglip": NamedModel("MedSigLIP", "google/medsiglip-448"),
}
"""The seven models of the benchmark."""


class NamedSource:
    """The files of a named model. See `Source`."""

    def __init__(self, model: NamedModel, source: Source) -> None:
        """source: the repository, or a folder with its files."""
        self._model, self._source = model, source

    def get(self, names: Sequence[str]) -> Path:
        """Return the path of the first of these files that exists. Raises UserError if none exists."""
        if names[0] == CONFIG_FILE and (path := self.find(CONFIG_FILE)):
            return path
        weights = self._model.weights
        if weights and weights not in names and any(name.endswith((".bin", ".safetensors")) for name in names):
            return self._source.get([weights, *names])
        return self._source.get(names)

    def find(self, name: str) -> Path | None:
        """Return the path of a file, or None if the model does not have it."""
        path = self._source.find(name)
        if path is None and name == CONFIG_FILE and self._source.find(TRANSFORMERS_CONFIG) is None:
            return self._model.config
        return path


def source_of_name(name: str) -> Source | None:
    """Return the files of `NAME` or `NAME=FOLDER`. None if the name is not one of `NAMES`.

    Raises:
        UserError: the folder is missing, or a folder has the name itself.
    """
    short, _, folder = name.partition("=")
    model = NAMES.get(short)
    if model is None:
        return None
    if folder:
        if not Path(folder).is_dir():
            raise UserError(f"{name}: {folder} is not a folder; pass one with the files of hf-hub:{model.repository}")
        return NamedSource(model, Folder(Path(folder)))
    if Path(name).exists():
        raise UserError(
            f"{name} is the short name of {model.title}, and also a file or folder; write ./{name} for the folder, or "
            f"hf-hub:{model.repository} for the model"
        )
    return NamedSource(model, Hub(model.repository))


def is_name(name: str) -> bool:
    """Return whether a name is `NAME` or `NAME=FOLDER` with one of `NAMES`."""
    return name.partition("=")[0] in NAMES
