"""Our losses in open_clip and transformers."""

from __future__ import annotations

import argparse
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from peers import import_open_clip

import bclip_fast
from bclip_fast.integrations import open_clip as into_open_clip
from bclip_fast.integrations import transformers as into_transformers

LOSSES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")


@pytest.fixture(scope="module")
def open_clip():
    return import_open_clip()


@pytest.fixture(scope="module")
def trainer(open_clip):
    return pytest.importorskip("open_clip_train.train")


@pytest.fixture
def uninstalled():
    yield
    into_open_clip.uninstall()
    into_transformers.uninstall()


def arguments(**changed):
    """The arguments of open_clip's trainer that a step reads."""
    values = {
        "model": "tiny", "distill": False, "siglip": False, "local_loss": False, "gather_with_grad": False, "rank": 0,
        "world_size": 1, "horovod": False, "loss_dist_impl": None, "device": "cpu", "precision": "fp32",
        "accum_freq": 1, "skip_scheduler": True, "grad_clip_norm": None, "log_every_n_steps": 1, "batch_size": 6,
        "wandb": False, "distributed": False, "local_rank": 0, "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changed})


def tiny_model(open_clip, args, seed):
    torch.manual_seed(seed)
    kind = {"init_logit_scale": 2.3, "init_logit_bias": -5.0} if args.siglip else {}
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    text = {"layers": 1, "width": 32, "heads": 2, "context_length": 8, "vocab_size": 50}
    return open_clip.CLIP(16, vision, text, output_dict=True, **kind)


def after_one_step(open_clip, trainer, args):
    """Return the loss class of create_loss, and gradients and weights after a step of open_clip's own trainer."""
    loss = open_clip.create_loss(args)
    model = tiny_model(open_clip, args, seed=1)
    batches = [(torch.randn(6, 3, 32, 32), torch.randint(1, 50, (6, 8))) for _ in range(args.accum_freq)]
    loader = type("Loader", (list,), {"num_batches": len(batches), "num_samples": 6 * len(batches)})(batches)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    teacher = tiny_model(open_clip, args, seed=2)
    trainer.train_one_epoch(model, data, loss, 0, optimizer, None, None, teacher, args)
    return type(loss), [parameter.grad for parameter in model.parameters()], list(model.parameters())


@pytest.mark.parametrize("changed", [{}, {"accum_freq": 2}, {"siglip": True}, {"distill": True}], ids=str)
def test_open_clips_trainer_step_is_unchanged(open_clip, trainer, changed, uninstalled):
    args = arguments(**changed)
    theirs, gradients, weights = after_one_step(open_clip, trainer, args)
    into_open_clip.install()
    ours, our_gradients, our_weights = after_one_step(open_clip, trainer, args)
    assert theirs.__module__ == "open_clip.loss"
    assert ours is getattr(bclip_fast, theirs.__name__)
    for our_tensor, true in zip(our_gradients + our_weights, gradients + weights, strict=True):
        # Compare norms: where elements nearly cancel, two float32 computations agree only as a whole.
        assert (our_tensor - true).norm() <= 2e-5 * true.norm()


def names_of(packages):
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}
    return {(name, key): id(value) for name, module in modules.items() for key, value in vars(module).items()}


def test_install_twice_and_uninstall_restores_all_names(open_clip, trainer, uninstalled):
    packages = ("open_clip", "open_clip_train")
    before = names_of(packages)
    into_open_clip.install()
    into_open_clip.install()
    changed = {key for key, value in names_of(packages).items() if before[key] != value}
    assert {name for _, name in changed} == set(LOSSES)
    assert {("open_clip.factory", name) for name in LOSSES} <= changed
    assert type(open_clip.create_loss(arguments(model="coca_tiny"))) is bclip_fast.CoCaLoss
    into_open_clip.uninstall()
    assert names_of(packages) == before
    into_open_clip.uninstall()
    assert names_of(packages) == before


def test_uninstall_reaches_modules_imported_after_install(open_clip, uninstalled, monkeypatch):
    into_open_clip.install()
    late = type(sys)("open_clip.late")
    late.ClipLoss = sys.modules["open_clip.loss"].ClipLoss
    monkeypatch.setitem(sys.modules, "open_clip.late", late)
    into_open_clip.uninstall()
    assert late.ClipLoss is sys.modules["open_clip.loss"].ClipLoss is not bclip_fast.ClipLoss


def test_transformers_clip_model_computes_loss_from_embeddings(uninstalled):
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(1)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shared, "vocab_size": 50, "max_position_embeddings": 8}
    vision = {**shared, "image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).double()
    inputs = {"input_ids": torch.randint(1, 49, (5, 8)), "pixel_values": torch.randn(5, 3, 16, 16).double()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def run(**extras):
        model.zero_grad()
        output = model(**inputs, return_loss=True, **extras)
        (output.loss if extras.get("return_dict", True) else output[0]).backward()
        return output, [parameter.grad for parameter in model.parameters()]

    original = transformers.CLIPModel.forward
    theirs, gradients = run()
    into_transformers.install()
    into_transformers.install()
    assert inspect.signature(transformers.CLIPModel.forward) == inspect.signature(original)
    ours, our_gradients = run()
    assert ours.logits_per_image is None
    assert ours.logits_per_text is None
    pairs = [(our_gradients, gradients)]
    pairs += [(getattr(ours, name), getattr(theirs, name)) for name in ("loss", "image_embeds", "text_embeds")]
    for our_tensor, true in pairs:
        torch.testing.assert_close(our_tensor, true, rtol=1e-9, atol=1e-12)
    as_tuple, _ = run(return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], theirs.loss)
    torch.testing.assert_close(model(**inputs).logits_per_image, theirs.logits_per_image)
    into_transformers.install(bclip_fast.ClipLoss(label_smoothing=0.5))
    assert not torch.isclose(run()[0].loss, theirs.loss)
    into_transformers.uninstall()
    assert transformers.CLIPModel.forward is original
    into_transformers.uninstall()
