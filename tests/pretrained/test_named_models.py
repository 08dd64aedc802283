"""The seven models of medpmc-clip-eval by short names: random weights in the layouts of their repositories.

The configurations at full size are compared with open_clip's and transformers' in test_published_layouts.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from coca_models import COCA, open_clip_coca, open_clip_config_of
from features import check_close, photographs
from peers import import_open_clip
from safetensors.torch import save_file
from sentencepieces import write_sentencepiece
from towers import GPT, SIGLIP, SMALL, shaken

from bclip_fast import load, save
from bclip_fast.config import parse
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.eval import EvalCommand
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.presets import preset
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.pretrained import layouts, named_models, save_transformers
from bclip_fast.pretrained.any_model import load_model
from bclip_fast.pretrained.sources import Hub, source_of

TEXTS = ["axial brain MRI", "chest x-ray of pneumonia"]


@pytest.fixture(autouse=True, scope="module")
def _torchvision() -> None:
    """transformers and timm import torchvision if it is installed. This stub has no operators."""
    import_open_clip()


def clip_tokenizer(length: int = 20) -> Tokenizer:
    """CLIP's byte pairs, with a small vocabulary. Token 0 pads."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz-"
    words = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    fast = Fast(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], end_of_word_suffix="</w>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.decoder = decoders.BPEDecoder(suffix="</w>")
    start, end = ("<|startoftext|>", 1), ("<|endoftext|>", 2)
    fast.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    fast.save("tokenizer.json")
    return Tokenizer.from_file(Path("tokenizer.json")).with_context_length(length)


CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 20, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}


def write_clip(folder: Path, weights: str, config: dict[str, Any] = CLIP, *, training: bool = False) -> Any:
    """open_clip's CLIP: its configuration, weights of a given name, and a tokenizer."""
    model = shaken(import_open_clip().CLIP(**config)).eval()
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if weights.endswith(".safetensors"):
        save_file(state, folder / weights)
    else:
        content = {"epoch": 7, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
        torch.save(content if training else state, folder / weights)
    return model


def write_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Write a tiny variant of a named model as its repository has it. Return the peer's model, or ours."""
    monkeypatch.chdir(tmp_path)
    if name in ("medpmc", "bmc", "pmc", "openclip"):
        files = {"medpmc": "open_clip_pytorch_model.safetensors", "bmc": "BMC_CLIP_CF.pt"}
        files |= {"pmc": "open_clip_model.safetensors", "openclip": "open_clip_pytorch_model.bin"}
        model = write_clip(folder, files[name], training=name == "bmc")
        clip_tokenizer().save(folder)
        return model
    if name == "coca":
        model = shaken(open_clip_coca(COCA)).eval()
        folder.mkdir()
        config = open_clip_config_of(COCA)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
        clip_tokenizer(COCA.text.context_length).save(folder)
        return model
    if name == "medsiglip":
        ours = shaken(BiomedClip(SIGLIP)).eval()
        tokenizer = Tokenizer.from_file(write_sentencepiece(tmp_path / "pieces"), 16)
        settings = PreprocessConfig(35, (0.5,) * 3, (0.5,) * 3, resize_mode="squash")
        save_transformers(folder, ours, Preprocess(settings), tokenizer)
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder).eval()
    ours = shaken(BiomedClip(SMALL)).eval()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(90))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = Tokenizer.from_file(tmp_path / "vocab.txt").with_context_length(20)
    save(folder, ours, Preprocess(PreprocessConfig(size=32)), tokenizer)
    return ours


@torch.no_grad()
@pytest.mark.parametrize("name", named_models.NAMES)
def test_named_model_gives_the_features_of_its_peer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = write_named(name, tmp_path / "files", monkeypatch, tmp_path)
    model, preprocess, tokenizer = load_model(f"{name}={tmp_path / 'files'}")
    pixels = torch.stack([preprocess(image) for image in photographs()])
    ids = tokenizer(TEXTS)
    if name == "medsiglip":
        images = theirs.get_image_features(pixel_values=pixels)
        texts = theirs.get_text_features(input_ids=ids)
        images, texts = (getattr(each, "pooler_output", each) for each in (images, texts))
    elif name == "biomedclip":
        images, texts = theirs.encode_image(pixels, normalize=False), theirs.encode_text(ids, normalize=False)
    else:
        images, texts = theirs.encode_image(pixels), theirs.encode_text(ids)
        if name == "coca":  # open_clip's CoCa always normalises
            images, texts = (torch.nn.functional.normalize(each, dim=1) for each in (images, texts))
    is_unit = name == "coca"
    check_close(model.encode_image(pixels, normalize=is_unit), images)
    check_close(model.encode_text(ids, normalize=is_unit), texts)


def test_named_models_without_a_configuration_are_open_clips_vit_l_14(tmp_path: Path) -> None:
    """The file names of the repositories, and all names and shapes of the weights, on the meta device."""
    config = import_open_clip().get_model_config("ViT-L-14")
    assert json.loads(named_models.NAMES["bmc"].config.read_text())["model_cfg"] == config  # type: ignore[union-attr]
    for name, weights in (("medpmc", "open_clip_pytorch_model.safetensors"), ("bmc", "BMC_CLIP_CF.pt")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / weights).write_bytes(b"")
        source = source_of(f"{name}={folder}")
        assert source.get(layouts.OPEN_CLIP_WEIGHTS) == folder / weights
        assert source.find("open_clip_config.json") == named_models.NAMES[name].config
    other = source_of(f"biomedclip={tmp_path}")
    assert other.find("open_clip_config.json") is None
    with pytest.raises(UserError, match="holds no BMC_CLIP_CF.pt or open_clip_model.safetensors"):
        source_of(f"bmc={tmp_path}").get(layouts.OPEN_CLIP_WEIGHTS)
    assert preset("clip_l14").text.vocab_size == GPT.vocab_size + 49308


def test_named_model_in_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    write_named("bmc", tmp_path / "files", monkeypatch, tmp_path)
    (tmp_path / "files" / "BMC_CLIP_CF.pt").write_bytes(pickle.dumps({"state_dict": Attack()}))
    with pytest.raises(UserError, match="BMC_CLIP_CF.pt"):
        load(f"bmc={tmp_path / 'files'}")
    torch.save({"state_dict": Attack()}, tmp_path / "files" / "BMC_CLIP_CF.pt")
    with pytest.raises(UserError, match="BMC_CLIP_CF.pt"):
        load(f"bmc={tmp_path / 'files'}")
    assert not (tmp_path / "ran").exists()


def test_named_model_is_that_of_the_hub_or_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Hub, "find", lambda self, name: asked.append((self.repository, name)))
    for name, model in named_models.NAMES.items():
        source = source_of(name)
        source.find("tokenizer.json")
        assert asked[-1] == (model.repository, "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coca").mkdir()
    with pytest.raises(UserError, match="coca is the short name of CoCa .* write ./coca for the folder"):
        source_of("coca")
    with pytest.raises(UserError, match="missing is not a folder; pass one with the files of hf-hub:BIOMEDICA"):
        source_of("bmc=missing")
    with pytest.raises(UserError, match="mine=coca is not a folder, and mine is not a short name"):
        source_of("mine=coca")
    with pytest.raises(UserError, match="holds no open_clip_config.json"):
        source_of("./coca")


@pytest.mark.parametrize("words", [["medpmc"], ["--model", "medpmc"], ["--model=medpmc"]])
def test_model_is_a_positional_argument_or_a_flag(words: list[str]) -> None:
    command = parse(EvalCommand, [*words, "--data", "x", "--suite", "medpmc"], prog="bclip eval")
    assert (command.model, command.data, command.suite) == ("medpmc", "x", "medpmc")
