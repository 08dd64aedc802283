"""PMC-CLIP's checkpoint and parts: names and shapes at full size, and the outputs of small encoders of its code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from features import check_close, photographs
from peers import import_open_clip
from towers import RESNET_VISION, shaken

from bclip_fast import load, save
from bclip_fast.errors import UserError
from bclip_fast.model import weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.resnet import BatchNorm
from bclip_fast.model.text import TextConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.pretrained import pmc_clip

TEXTS = ["axial brain MRI", "Chest radiograph, of a PATIENT!", "nuclei " * 30]
SMALL_PMC_CLIP = BiomedClipConfig(
    embed_dim=24,
    vision=dataclasses.replace(RESNET_VISION, image_size=64),
    text=TextConfig(
        **{"context_length": 20, "vocab_size": 100, "width": 32, "layers": 2, "heads": 2, "max_positions": 24},
        **{"projection": "linear", "attend_padding": True},
    ),
)


def pmc_clip_state(config: BiomedClipConfig) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """The encoders of PMC-CLIP's code, and the state of its training checkpoint, with random weights."""
    open_clip = import_open_clip()
    from transformers import BertConfig, BertModel

    vision, text = config.vision, config.text
    visual = open_clip.modified_resnet.ModifiedResNet(
        vision.blocks, config.embed_dim, vision.heads, vision.image_size, vision.width
    )
    sizes = {"hidden_size": text.width, "num_hidden_layers": text.layers, "num_attention_heads": text.heads}
    sizes |= {"vocab_size": text.vocab_size, "max_position_embeddings": text.max_positions}
    bert = BertModel(BertConfig(**sizes, intermediate_size=4 * text.width, pad_token_id=0))
    shaken(visual), shaken(bert)
    state = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    state |= {f"text_encoder.{name}": tensor for name, tensor in bert.state_dict().items()}
    state["text_encoder.embeddings.position_ids"] = torch.arange(text.max_positions)[None]
    state |= {"text_projection": torch.randn(text.width, config.embed_dim), "logit_scale": torch.tensor(4.4)}
    state |= {"mlm_projection": torch.randn(text.width, text.vocab_size), "ln_final.weight": torch.ones(text.width)}
    state |= {"img_special_token": torch.zeros(1, 1, config.embed_dim), "ln_final.bias": torch.zeros(text.width)}
    state |= {"positional_embedding": torch.zeros(text.context_length, text.width)}
    state |= {f"fusion_module.resblocks.{i}.ln_1.weight": torch.ones(text.width) for i in range(4)}
    return visual.eval(), bert.eval(), state


@torch.no_grad()
@pytest.mark.parametrize("files", ["checkpoint", "parts"])
def test_load_pmc_clip(files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """PMC-CLIP's code passes no attention mask, so BERT attends to padding up to the context length."""
    monkeypatch.setattr(pmc_clip, "CONFIG", SMALL_PMC_CLIP)
    visual, bert, state = pmc_clip_state(SMALL_PMC_CLIP)
    if files == "checkpoint":
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": wrapped}, tmp_path / "checkpoint.pt")
    else:
        torch.save(visual.state_dict(), tmp_path / "image_encoder(resnet50).pth")
        torch.save(bert.state_dict(), tmp_path / "text_encoder.pth")
        torch.save(torch.nn.Parameter(state["text_projection"]), tmp_path / "text_projection_layer.pth")
    Tokenizer.train(TEXTS * 3, 100, context_length=20).save(tmp_path)
    with caplog.at_level("INFO"):
        model, preprocess, tokenizer = load(tmp_path)
    assert ("no logit scale; it is 4.4292" in caplog.text) == (files == "parts")
    assert "no embedding reads" in caplog.text
    assert model.logit_scale.item() == pytest.approx(4.4 if files == "checkpoint" else 4.4292)
    pixels, ids = torch.stack([preprocess(each) for each in photographs()]), tokenizer(TEXTS)
    check_close(model.encode_image(pixels, normalize=False), visual(pixels))
    expected = (
        bert(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0] @ state["text_projection"]
    )
    check_close(model.encode_text(tokenizer.packed(TEXTS), normalize=False), expected)
    check_close(model.encode_text(ids, normalize=False), expected)
    # open_clip has no such tower and must not open our file as another one.
    save(tmp_path / "again", model, preprocess, tokenizer)
    again = load(tmp_path / "again")[0]
    assert again.config == model.config
    assert torch.equal(again.encode_text(ids), model.encode_text(ids))
    with pytest.raises(TypeError, match="attend_padding"):
        import_open_clip().create_model(f"local-dir:{tmp_path / 'again'}")


def test_pmc_clip_names_and_shapes_at_full_size() -> None:
    with torch.device("meta"):
        _, _, state = pmc_clip_state(pmc_clip.CONFIG)
        model = BiomedClip(pmc_clip.CONFIG)
    unread = {name for name in state if name.startswith(("fusion_module.", "ln_final.", "text_encoder.pooler."))}
    unread |= {"mlm_projection", "img_special_token", "positional_embedding", "text_encoder.embeddings.position_ids"}
    renamed = pmc_clip.open_clip_names(state, unread)
    loaded = weights.from_open_clip(renamed, model, source="checkpoint.pt")
    assert loaded.keys() == model.state_dict().keys()
    assert sum(isinstance(module, BatchNorm) for module in model.modules()) == 55


def test_checkpoint_of_another_model_is_not_pmc_clips(tmp_path: Path) -> None:
    torch.save({"state_dict": {"visual.x": torch.ones(1)}}, tmp_path / "checkpoint.pt")
    Tokenizer.train(TEXTS * 3, 100, context_length=20).save(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint.pt isn't PMC-CLIP's: it lacks text_projection or text_encoder"):
        load(tmp_path)
