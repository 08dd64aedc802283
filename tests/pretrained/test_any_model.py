"""Load models by name, and evaluate models of open_clip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from colours import evaluate_with, write_class_folders
from peers import import_open_clip
from PIL import Image
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.eval import EvalConfig, evaluate, prompts

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2, "context_length": 77, "vocab_size": 49408},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Red and blue images in split `test`."""
    return write_class_folders(tmp_path / "folder", {"test": 3})


def test_load_model_open_clip_names_give_the_models_scores(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Load by a file of weights, and by a tag. A copy of the file replaces the download of the tag."""
    open_clip = import_open_clip()
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)
    torch.manual_seed(3)
    model, _, transform = open_clip.create_model_and_transforms("tiny")
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    tag = {"url": "https://example.org/tiny.pt", "mean": (0.5,) * 3, "std": (0.2,) * 3}
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "tiny", {"published": tag, "quick": tag | {"quick_gelu": True}}
    )
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **options: str(tmp_path / "tiny.pt"))
    config = EvalConfig(data=str(folder), split="test", progress=False)
    expected = evaluate_with(config, model.eval(), transform, open_clip.get_tokenizer("tiny"))["tasks"]
    by_file = evaluate(f"open_clip:tiny/{tmp_path / 'tiny.pt'}", data=str(folder), split="test", progress=False)
    assert by_file["tasks"] == expected
    assert by_file["model"]["num_parameters"] == sum(p.numel() for p in model.parameters())
    other = open_clip.image_transform(32, is_train=False, mean=tag["mean"], std=tag["std"])
    by_tag = evaluate("open_clip:tiny/published", data=str(folder), split="test", progress=False)["tasks"]
    assert by_tag == evaluate_with(config, model, other, open_clip.get_tokenizer("tiny"))["tasks"] != expected
    (tmp_path / "broken.pt").write_bytes(b"broken")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, words in (
        ("tiny/none", "cannot load none: Pretrained value 'none' is not a known tag"),
        (f"tiny/{tmp_path / 'broken.pt'}", "cannot load .*broken.pt"),
        (f"tiny/{tmp_path / 'other.pt'}", "cannot load .*other.pt: Error.s. in loading state_dict"),
        (f"tiny/{tmp_path / 'pointer.pt'}", "pointer.pt is a git-lfs pointer"),
        ("tiny/quick", "quick was trained with QuickGELU, and tiny has exact GELU; use open_clip:tiny-quickgelu/quick"),
        ("nothing/none", "an architecture that open_clip lists"),
        ("tiny", "use open_clip:ARCHITECTURE/PRETRAINED"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            evaluate(f"open_clip:{name}", data=str(folder), split="test", progress=False)
        assert "\n" not in str(caught.value)


def test_evaluate_open_clip_model_equals_its_own_arithmetic(folder: Path) -> None:
    open_clip = import_open_clip()
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)
    transform = open_clip.image_transform(32, is_train=False)
    config = EvalConfig(data=str(folder), split="test", progress=False)
    result = evaluate_with(config, model, transform, open_clip.SimpleTokenizer())["tasks"]["zero_shot/class"]

    def encode(name: str) -> Tensor:
        ids = open_clip.SimpleTokenizer()([template.format(name) for template in prompts.GENERIC_TEMPLATES])
        return F.normalize(F.normalize(model.encode_text(ids), dim=1).mean(0), dim=0)

    files = sorted((folder / "test").rglob("*.jpg"))
    with torch.no_grad():
        images = F.normalize(
            model.eval().encode_image(torch.stack([transform(Image.open(file)) for file in files])), dim=1
        )
        predictions = (images @ torch.stack([encode("blue"), encode("red")]).T).argmax(1)
    expected = [[0, 0], [0, 0]]
    for file, prediction in zip(files, predictions.tolist(), strict=True):
        expected[["blue", "red"].index(file.parent.name)][prediction] += 1
    assert result["confusion"] == expected
