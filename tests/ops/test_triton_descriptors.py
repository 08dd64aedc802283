"""The contrastive Triton kernels with tensor descriptors: interpreted, and in the machine code for sm_90."""

from __future__ import annotations

import pytest
import torch
from inside import num_passed
from interpreter import ENVIRONMENT, INTERPRETED, compiled, interpreted
from judged import (
    assert_close,
    features,
    judge_clip_loss,
    judge_clip_operator,
    judge_rectangle,
    judge_siglip_operator,
)
from launches import CONTRASTIVE_VARIANTS, contrastive
from resources import compiled_resources, instructions
from torch.nn.functional import normalize

from bclip_fast import ops
from bclip_fast.ops import cuda_device
from bclip_fast.ops.contrastive import reference
from bclip_fast.ops.contrastive.call import ContrastiveCall

pytest.importorskip("triton.tools.tensor_descriptor")
ours = pytest.importorskip("bclip_fast.ops.contrastive.triton")
tma_kernels = pytest.importorskip("bclip_fast.ops.contrastive.triton_tma_kernels")

HALF = torch.float16
# Shared memory and registers of a multiprocessor of sm_90. A block takes 1 KiB of shared memory more than it asks for.
SHARED, REGISTERS = 228 * 1024, 65536


@pytest.fixture(autouse=True)
def _interpret_sm_90(monkeypatch):
    """Outside this file, the interpreter runs the kernels with pointers."""
    monkeypatch.setenv("BCLIP_INTERPRET_CAPABILITY", "90")


def half_features(num_rows, width, aligned=None):
    return features(num_rows, width, HALF, aligned)


@compiled
@pytest.mark.slow
def test_descriptor_kernels_pass_the_operators_tests_under_the_interpreter():
    """Groups, hardness, repeated calls, and this file's interpreted tests. float32 takes the pointers."""
    files = "test_contrastive_modes.py", "test_contrastive_targets.py", "test_triton_descriptors.py"
    selected = "(triton and float16) or descriptors"
    assert num_passed(files, selected, **ENVIRONMENT, BCLIP_INTERPRET_CAPABILITY="90") >= 20


@compiled
def test_descriptors_serve_half_precision_on_sm_90_only(monkeypatch):
    for dtype in (HALF, torch.bfloat16, torch.float32):
        for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
            expected = capability == (9, 0) and dtype != torch.float32
            assert ours.takes_descriptors(dtype, capability) == expected, (dtype, capability)
    monkeypatch.setattr(ours, "_HAS_DESCRIPTORS", False)  # Triton before 3.4
    assert not ours.takes_descriptors(HALF, (9, 0))


@compiled
def test_unknown_interpreted_capability_is_refused(monkeypatch):
    assert cuda_device.interpreted_capability() == (9, 0)
    monkeypatch.setenv("BCLIP_INTERPRET_CAPABILITY", "9.0")
    with pytest.raises(ValueError, match="BCLIP_INTERPRET_CAPABILITY='9.0' is unknown; set it to 80 or 90"):
        cuda_device.interpreted_capability()


@interpreted
@pytest.mark.parametrize("capability", ["80", "90"])
def test_descriptors_or_pointers_follow_the_interpreted_capability(capability, monkeypatch):
    if not INTERPRETED:
        pytest.skip("a GPU has its own compute capability")
    monkeypatch.setenv("BCLIP_INTERPRET_CAPABILITY", capability)
    launched = recorded_votes(monkeypatch)
    ours.forward(ContrastiveCall(half_features(3, 16), half_features(3, 16), torch.tensor(5.0), 0, 64))
    assert len(launched) == (capability == "90")


@interpreted
@pytest.mark.parametrize(("shape", "scale"), [((137, 67), 14.3), ((131, 19), 100.0), ((1, 2), 14.3)], ids=str)
def test_descriptors_clip_loss_of_prime_shapes_is_as_accurate_as_eager(shape, scale, nan_filled):
    judge_clip_operator("triton", shape, scale, HALF)


@interpreted
@pytest.mark.parametrize("shape", [(137, 67), (1, 2)], ids=str)
def test_descriptors_siglip_loss_of_prime_shapes_is_as_accurate_as_eager(shape, nan_filled):
    judge_siglip_operator("triton", shape, HALF, 1e-3)


@interpreted
@pytest.mark.parametrize("positive_offset", [0, 97, None])
@pytest.mark.parametrize("chunk_size", [13, 64])
def test_descriptors_of_rectangles_match_the_reference(chunk_size, positive_offset, nan_filled):
    judge_rectangle(ours, half_features, positive_offset, chunk_size, 1e-3)


@interpreted
def test_descriptors_of_positives_past_the_last_text_match_the_reference(nan_filled):
    """The texts of the last images belong to another tile, and so do those of all images."""
    image, text, scale, bias = half_features(41, 23), half_features(151, 23), torch.tensor(30.0), torch.tensor(-2.0)
    for offset in (140, 151, 400):
        call = ContrastiveCall(image, text, scale, offset, 64, bias=bias)
        exact = ContrastiveCall(image.double(), text.double(), scale.double(), offset, 64, bias=bias.double())
        assert_close(ours.forward(call), reference.forward(exact), 1e-6)
        truth = reference.siglip(exact, 0.1, torch.float64, True)
        assert_close(ours.siglip(call, 0.1, torch.float32, True), truth, 1e-3)


@interpreted
def test_descriptors_more_rows_than_one_launch_match_the_reference(nan_filled):
    image, text = half_features(151, 7), half_features(157, 7)
    truth = reference.forward(ContrastiveCall(image.double(), text.double(), torch.tensor(5.0), 3, 64))
    assert_close(ours.forward(ContrastiveCall(image, text, torch.tensor(5.0), 3, 1)), truth, 1e-6)


def recorded_votes(monkeypatch):
    """The votes that each launch of the second kernel gets, as lists."""
    kernel, votes = tma_kernels._redo_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                votes.append(arguments[5].tolist())
                kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(tma_kernels, "_redo_kernel", Recorder())
    return votes


@interpreted
@pytest.mark.parametrize("distant", ["images", "texts"])
def test_descriptors_only_tiles_with_distant_rows_are_computed_again(distant, monkeypatch, nan_filled):
    """Most cosines are near -0.8, and ten images or texts have 1. At 100, their logits share tiles with those of -80.

    S has 3 x 6 or 6 x 3 tiles, which two programs of the second kernel read.
    """
    votes = recorded_votes(monkeypatch)
    direction, other = features(2, 31).double()
    across = normalize(other - (other @ direction) * direction, dim=0)
    mixed = near(-0.8 * direction + 0.6 * across, 300)
    mixed[130:140] = near(direction, 10)
    image, text, scale = mixed, near(direction, 700), torch.tensor(100.0)
    # The programs' order is down the columns of tiles. Tiles of the second of three rows or columns vote.
    expected = [0, 1, 0] * 6
    if distant == "texts":
        image, text, expected = text, mixed, [0] * 6 + [1] * 6 + [0] * 6
    exact = ContrastiveCall(image.double(), text.double(), scale.double(), 0, 64)
    truth = reference.forward(exact)
    sums = truth[0 if distant == "images" else 1]
    assert sums.max() - sums.min() > 150
    assert_close(ours.forward(ContrastiveCall(image, text, scale, 0, 64)), truth, 1e-6)
    assert votes == [expected]
    inputs = image[:300], text[:300], scale, torch.tensor(0.0)
    judge_clip_loss(lambda *a: ops.clip_loss(*a, backend="triton"), lambda: list(inputs), draws=1)


def near(direction, num_rows):
    """Rows of length 1 near a direction, in float16."""
    return normalize(direction + 0.01 * torch.randn(num_rows, len(direction)).double(), dim=1).half()


@interpreted
def test_descriptors_cone_of_low_cosines_is_not_computed_again(monkeypatch):
    """All cosines are near -0.8, so each tile's own offset serves. An offset by the scale would give zeros."""
    votes = recorded_votes(monkeypatch)
    direction = features(1, 31)
    image, text = half_features(140, 31, -direction), half_features(40, 31, direction)
    scale = torch.tensor(100.0)
    truth = reference.forward(ContrastiveCall(image.double(), text.double(), scale.double(), 0, 64))
    assert truth[0].max() < -30
    assert_close(ours.forward(ContrastiveCall(image, text, scale, 0, 64)), truth, 1e-6)
    assert votes == [[0, 0]]


SLOW = {"_backward_kernel of groups", "_siglip_kernel"}


@compiled
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (HALF, 512),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [(torch.bfloat16, 512), (HALF, 96), (HALF, 768)]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in SLOW else [])
        for name in ("_redo_kernel", *CONTRASTIVE_VARIANTS)
    ],
)
def test_descriptor_kernels_share_a_multiprocessor_of_sm_90(name, dtype, width, tmp_path):
    """Two programs fit by registers and shared memory, TMA copies, and tensor cores take 128 columns at a time."""
    launch = contrastive(name, dtype, width, 90)
    registers, spilled, shared = compiled_resources(*launch, 90, tmp_path)
    assert spilled == 0
    assert registers <= 128
    assert 2 * 8 * 32 * registers <= REGISTERS
    assert 2 * (shared + 1024) <= SHARED
    code = instructions(*launch, 90, tmp_path)
    assert {each for each in code if "MMA" in each} == {"HGMMA.64x128x16.F32" + (".BF16" if dtype != HALF else "")}
    assert code["UTMALDG.2D"] >= 2
    assert not [each for each in code if each.startswith("LDGSTS")]
    # G is written through its descriptor, a slice at a time.
    writes = name != "_redo_kernel" and name != "_forward_kernel"
    assert code["UTMASTG.2D"] == (8 if writes else 0)
    # Atomic additions would make sums depend on the order of programs. REDUX reduces over the lanes of a warp.
    assert not {each.partition(".")[0] for each in code} & {"ATOM", "ATOMG", "ATOMS", "RED", "REDG", "UTMAREDG"}
