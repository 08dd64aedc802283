"""Both towers in torch.export and torch.jit.trace: graphs of plain torch operations, equal to eager.

The results agree to 1e-5 of unit-length embeddings: sums run in another order.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from coca_models import COCA
from torch import Tensor, nn
from towers import GPT, SMALL, padded_ids, shaken

from bclip_fast.errors import BackendError
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.packed import Packed
from bclip_fast.model.vision import VisionConfig
from bclip_fast.ops import use_backend

RESNET = VisionConfig(kind="resnet", image_size=64, patch_size=32, width=8, layers=4, heads=8, blocks=(1, 1, 1, 1))
MODELS = {
    "vit and bert": SMALL,
    "clip and gpt": dataclasses.replace(
        SMALL, vision=dataclasses.replace(SMALL.vision, kind="clip"), text=GPT, quick_gelu=True
    ),
    "resnet and gpt with an end token": dataclasses.replace(
        SMALL, vision=RESNET, text=dataclasses.replace(GPT, end_id=3)
    ),
    "coca": COCA,
}
Dim = torch.export.Dim


class Images(nn.Module):
    def __init__(self, model: BiomedClip) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)


class Texts(nn.Module):
    def __init__(self, model: BiomedClip) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


class PackedTexts(nn.Module):
    def __init__(self, model: BiomedClip, max_seqlen: int) -> None:
        super().__init__()
        self.model, self.max_seqlen = model, max_seqlen

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.model.encode_text(Packed(ids, cu_seqlens, self.max_seqlen))


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> BiomedClip:
    return shaken(BiomedClip(MODELS[request.param])).eval()


def images_of(config: BiomedClipConfig, count: int) -> Tensor:
    size = config.vision.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def ids_of(config: BiomedClipConfig, lengths: list[int]) -> Tensor:
    """Padded ids with padding inside a caption too, and one caption of padding only."""
    ids = padded_ids(lengths)
    ids[0, 1] = config.text.pad_id
    if config.text.kind == "gpt":
        end = config.text.vocab_size - 1 if config.text.end_id is None else config.text.end_id
        ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = end
    else:
        ids[-1] = config.text.pad_id
    return ids


def check(graph: Any, eager: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), eager(*inputs), rtol=0, atol=1e-5)


def operators_of_ours(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("bclip")]


def test_exported_image_tower_equals_eager(model: BiomedClip) -> None:
    tower = Images(model)
    images, others = images_of(model.config, 3), images_of(model.config, 5)
    raw = torch.randint(0, 256, images.permute(0, 2, 3, 1).shape, dtype=torch.uint8)
    for example, batches in ((images, (images, others, others[:1])), (raw, (raw, raw[:2]))):
        dynamic = torch.export.export(tower, (example,), dynamic_shapes=({0: Dim("batch", max=64)},))
        assert not operators_of_ours(dynamic)
        for batch in batches:
            check(dynamic.module(), tower, batch)


def test_exported_text_tower_equals_eager(model: BiomedClip) -> None:
    tower = Texts(model)
    ids, others = ids_of(model.config, [20, 7, 2]), ids_of(model.config, [5, 20, 11, 3])
    sizes = {0: Dim("batch", max=64), 1: Dim("tokens", min=2, max=model.config.text.context_length)}
    dynamic = torch.export.export(tower, (ids,), dynamic_shapes=(sizes,))
    assert not operators_of_ours(dynamic)
    for batch in (ids, others, others[2:, :11], others[:1]):
        check(dynamic.module(), tower, batch)


def test_exported_packed_text_tower_equals_eager(model: BiomedClip) -> None:
    tower = PackedTexts(model, model.config.text.context_length)
    first, second = (packed_of(model.config, lengths) for lengths in ([20, 7, 2], [5, 20, 11, 3, 2]))
    sizes = {0: Dim("tokens", min=3, max=4096)}, {0: Dim("bounds", min=3, max=65)}
    dynamic = torch.export.export(tower, first, dynamic_shapes=sizes)
    assert not operators_of_ours(dynamic)
    for batch in (first, second):
        check(dynamic.module(), tower, *batch)


def test_towers_exported_with_static_shapes_equal_eager() -> None:
    model = shaken(BiomedClip(SMALL)).eval()
    for tower, inputs in (
        (Images(model), (images_of(SMALL, 3),)),
        (Texts(model), (ids_of(SMALL, [20, 7, 2]),)),
        (PackedTexts(model, 20), packed_of(SMALL, [20, 7, 2])),
    ):
        program = torch.export.export(tower, inputs)
        assert not operators_of_ours(program)
        check(program.module(), tower, *inputs)


def packed_of(config: BiomedClipConfig, lengths: list[int]) -> tuple[Tensor, Tensor]:
    rows = ids_of(config, lengths)
    text = Packed.of(torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)]), lengths)
    return text.ids, text.cu_seqlens


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_towers_equal_eager_for_other_batches(model: BiomedClip) -> None:
    for tower, example, other in (
        (Images(model), images_of(model.config, 3), images_of(model.config, 5)),
        (Texts(model), ids_of(model.config, [20, 7, 2]), ids_of(model.config, [5, 20, 11, 3])),
    ):
        with torch.no_grad():
            traced = torch.jit.trace(tower, example)
        assert "bclip::" not in str(traced.inlined_graph)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        for batch in (example, other):
            check(torch.jit.load(buffer), tower, batch)
            buffer.seek(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_by_tracing_raises() -> None:
    tower = Images(shaken(BiomedClip(SMALL)).eval())
    with pytest.raises(BackendError, match="dynamo=True"):
        torch.onnx.export(tower, (images_of(SMALL, 2),), io.BytesIO(), dynamo=False)


def test_named_backend_keeps_our_operators_in_the_graph() -> None:
    tower = Images(shaken(BiomedClip(SMALL)).eval())
    with use_backend("reference"):
        program = torch.export.export(tower, (images_of(SMALL, 2),))
    assert any("bclip.attention" in name or "bclip.fused" in name for name in operators_of_ours(program))


def test_exported_bfloat16_towers_equal_eager() -> None:
    model = shaken(BiomedClip(SMALL)).eval().to(torch.bfloat16)
    for tower, example in (
        (Images(model), images_of(SMALL, 3).bfloat16()),
        (Texts(model), ids_of(SMALL, [20, 7, 2])),
    ):
        program = torch.export.export(tower, (example,))
        with torch.no_grad():
            difference = (program.module()(example) - tower(example)).float().norm(dim=-1).max()
        assert difference < 0.03  # bfloat16 has 8 bits, and both round in other places
