"""CoCa's towers and decoder against open_clip's, packed against padded captions, and the configurations of both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from coca_models import COCA, open_clip_coca
from peers import import_open_clip
from torch import Tensor, nn
from towers import gradients, padded_ids, shaken

from bclip_fast.model import weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.coca import rows_before_another
from bclip_fast.model.packed import Packed

# The last caption fills the context.
LENGTHS = [3, 1, 7, 20, 19]


def ours_of(theirs: nn.Module, config: BiomedClipConfig) -> BiomedClip:
    model = BiomedClip(config)
    model.load_state_dict(weights.from_open_clip(theirs.state_dict(), model, source="open_clip"))
    return model.eval()


@pytest.mark.parametrize("embed_dim", [32, 48], ids=["other width of the image's tokens", "one width"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_coca_equals_open_clip(embed_dim: int, quick_gelu: bool) -> None:
    import_open_clip()
    text = dataclasses.replace(COCA.text, width=embed_dim)
    config = dataclasses.replace(COCA, embed_dim=embed_dim, text=text, quick_gelu=quick_gelu)
    theirs = shaken(open_clip_coca(config)).eval()
    model = ours_of(theirs, config)
    image, ids = torch.randn(len(LENGTHS), 3, 32, 32), padded_ids(LENGTHS)
    with torch.no_grad():
        expected = theirs(image, ids)
        features = model(image, ids)
        logits = model.caption_logits(image, ids)
        losses = model(image, ids, captions=True)
    for name in ("image_features", "text_features"):
        assert (features[name] - expected[name]).abs().max() <= 1e-5
        assert (losses[name] - expected[name]).abs().max() <= 1e-5
    assert (expected["text_features"][0] - expected["text_features"][2]).abs().max() > 1e-2
    # open_clip's rows are padded, and ours are packed. Its logits of padding mean nothing.
    rows = torch.arange(ids.shape[1] - 1) < torch.tensor(LENGTHS)[:, None] - 1
    packed = logits[rows_before_another(Packed.of(ids[ids != 0], LENGTHS))]
    assert packed.shape == (sum(LENGTHS) - len(LENGTHS), config.text.vocab_size)
    assert (packed - expected["logits"][rows]).abs().max() <= 1e-5 * expected["logits"][rows].abs().max()
    mean = nn.functional.cross_entropy(expected["logits"].permute(0, 2, 1), expected["labels"], ignore_index=0)
    assert losses["caption_losses"].item() / rows.sum().item() == pytest.approx(mean.item(), rel=1e-5)


def test_gradients_equal_open_clips() -> None:
    import_open_clip()
    theirs = shaken(open_clip_coca(COCA)).double()
    model = ours_of(theirs, COCA).double().train()
    image, ids = torch.randn(len(LENGTHS), 3, 32, 32, dtype=torch.float64), padded_ids(LENGTHS)

    def our_loss() -> Tensor:
        output = model(image, ids, captions=True)
        return (output["image_features"] * output["text_features"]).sum() + output["caption_losses"]

    def their_loss() -> Tensor:
        output = theirs(image, ids)
        labels = output["labels"]
        captions = nn.functional.cross_entropy(
            output["logits"].permute(0, 2, 1), labels, ignore_index=0, reduction="sum"
        )
        return (output["image_features"] * output["text_features"]).sum() + captions

    ours = gradients(model, our_loss)
    expected = weights.from_open_clip(
        gradients(theirs, their_loss) | {"logit_scale": torch.tensor(0.0)}, model, source=""
    )
    assert ours.keys() == expected.keys() - {"logit_scale"}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient.float(), expected[name], rtol=1e-4, atol=1e-4, msg=name)
