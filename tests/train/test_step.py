"""A training step of both towers, compared with open_clip's, and the benchmark that times both."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from peers import import_open_clip
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from towers import GPT, shaken

from bclip_fast import ops
from bclip_fast.benchmarks import measure
from bclip_fast.benchmarks.cases.model import Inputs, StepConfig, caption_lengths, make_inputs, open_clip_twin
from bclip_fast.benchmarks.report import BenchConfig, run
from bclip_fast.benchmarks.step import measure_step
from bclip_fast.data.transform import normalize
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.packed import Packed
from bclip_fast.model.presets import preset
from bclip_fast.model.weight_names import key_map
from bclip_fast.ops import matmul

QUICKSTART = preset("quickstart")
# Two layers cover both cases: the last layer computes only its first token, the one before it all tokens.
SHALLOW = replace(QUICKSTART, vision=replace(QUICKSTART.vision, layers=2), text=replace(QUICKSTART.text, layers=2))
BERT = replace(QUICKSTART, text=replace(QUICKSTART.text, context_length=48))
GPT_TEXT = replace(QUICKSTART, text=replace(GPT, width=128, heads=4, vocab_size=500, context_length=48))


@pytest.fixture(autouse=True)
def _small_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmark's reference matmul small. It would take most of the time, and no test checks its rate."""
    monkeypatch.setattr(measure, "MATMUL_SIZE", 64)


@pytest.fixture
def histogram(tmp_path: Path) -> str:
    """A file with lengths of captions, from 2 tokens (an empty caption) to more than the context length."""
    path = tmp_path / "lengths.txt"
    path.write_text("2 2\n17 1\n30 2\n48 1\n500 2\n")
    return str(path)


def run_step(model: nn.Module, image: Tensor, text: Packed | Tensor, low: bool) -> dict[str, Tensor]:
    """Features, and the gradients of the contrastive loss by parameter."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        output = model(image, text)
    if isinstance(output, tuple):
        output = dict(zip(("image_features", "text_features", "logit_scale"), output, strict=True))
    features = [output[name].double() for name in ("image_features", "text_features")]
    ops.clip_loss(*features, output["logit_scale"].double()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"image": features[0].detach(), "text": features[1].detach(), **gradients}


def both(config, inputs: Inputs, low: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The results (ours, open_clip's, open_clip's in float64), each under our names."""
    import_open_clip()
    ours = shaken(BiomedClip(config))
    theirs = open_clip_twin(ours).train()
    keys = key_map(config)

    def renamed(results: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {name: torch.cat([results[key].flatten() for key in theirs]) for name, theirs in keys.items()}
        return {**{name: results[name] for name in ("image", "text")}, **named}

    our_results = run_step(ours.train(), inputs.images, inputs.text, low)
    eager = renamed(run_step(theirs, normalize(inputs.images), inputs.ids, low))
    truth = renamed(run_step(theirs.double(), normalize(inputs.images).double(), inputs.ids, False))
    return {name: value.reshape(truth[name].shape) for name, value in our_results.items()}, eager, truth


def error(value: Tensor, true: Tensor) -> float:
    return float((value.double() - true.double()).norm() / true.double().norm())


@pytest.mark.parametrize("config", [BERT, GPT_TEXT], ids=["bert", "gpt"])
def test_features_and_gradients_equal_open_clip(config, histogram: str) -> None:
    inputs = make_inputs(StepConfig(lengths=histogram, batch_size=8), config)
    assert inputs.text.lengths.tolist().count(2) == 2
    assert inputs.text.max_seqlen == 48
    ours, eager, truth = both(config, inputs, low=False)
    assert ours.keys() == truth.keys()
    assert len(ours) > 50
    for name, true in truth.items():
        assert max(error(ours[name], eager[name]), error(ours[name], true)) <= 1e-4, name


@pytest.mark.parametrize("library", [False, True], ids=["ours", "library"])
def test_bfloat16_error_is_at_most_twice_open_clips(
    library: bool, histogram: str, monkeypatch: pytest.MonkeyPatch, unmeasured: None
) -> None:
    """Check our linear layers, which are used for many tokens, and the library's.

    Average the squared errors over four models. The error of the logit scale's gradient, a single number, varies from a
    tenth to twice the usual error.
    """
    monkeypatch.setattr(matmul, "_library_is_faster", lambda *_: library)
    inputs = make_inputs(StepConfig(lengths=histogram, batch_size=8), BERT)
    our_errors, their_errors = defaultdict(list), defaultdict(list)
    for seed in range(4):
        torch.manual_seed(seed)
        ours, eager, truth = both(BERT, inputs, low=True)
        for name, true in truth.items():
            our_errors[name].append(error(ours[name], true) ** 2)
            their_errors[name].append(error(eager[name], true) ** 2)
    for name, squares in our_errors.items():
        mean, allowed = fmean(squares) ** 0.5, 2 * fmean(their_errors[name]) ** 0.5 + 1e-5
        assert mean <= allowed, f"{name}: {mean:.3g}, allowed {allowed:.3g}"
    assert fmean(their_errors["text"]) > 1e-8, "the comparison must not have run in float32"


def test_compiled_model_has_one_graph_for_all_lengths() -> None:
    model = BiomedClip(SHALLOW).train()
    image = torch.randint(0, 256, (3, 80, 80, 3), dtype=torch.uint8)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for lengths in ([3, 9, 5], [40, 2, 8], [7, 7, 7], [1, 1, 48]):
        text = Packed.of(torch.randint(5, 2000, (sum(lengths),)), lengths)
        torch.testing.assert_close(compiled(image, text)["text_features"], model(image, text)["text_features"])
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


def test_compiled_layers_give_same_gradients_for_all_lengths() -> None:
    torch.manual_seed(0)
    model = shaken(BiomedClip(SHALLOW)).train()
    image = torch.randint(0, 256, (3, 80, 80, 3), dtype=torch.uint8)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    batches = [Packed.of(torch.randint(5, 2000, (sum(n),)), n) for n in ([3, 9, 5], [40, 2, 8], [7, 7, 7], [1, 1, 48])]
    plain = [run_step(model, image, text, low=False) for text in batches]
    model.compile_layers(backend=counter)
    counts = []
    for text, expected in zip(batches, plain, strict=True):
        results = run_step(model, image, text, low=False)
        assert results.keys() == expected.keys()
        for name, value in results.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 4


def test_benchmark_has_row_for_each_variant(histogram: str) -> None:
    import_open_clip()
    config = StepConfig(preset="quickstart", batch_size=4, lengths=histogram, rounds=1, dropout=0.1)
    rows = measure_step(config)
    names = [row["contender"] for row in rows]
    assert names[:2] == ["open_clip", "ours, padded, plain PyTorch"]
    assert len(names) == len(set(names)) == 12
    assert names[-2:] == ["open_clip, checkpointed", "ours, checkpointed"]
    for row in rows:
        parts = row["forward_seconds"] + row["backward_seconds"] + row["optimizer_seconds"]
        assert row["seconds"] == pytest.approx(parts)
        assert row["samples_per_second"] == pytest.approx(4 / parts)
        assert row["tokens"] == sum([2, 30, 48, 48]) or row["tokens"] > 100


def test_benchmark_measures_mixtures_of_lengths(histogram: str) -> None:
    config = StepConfig(preset="quickstart", batch_size=5, lengths=histogram, rounds=1, mixtures=True)
    rows, most = measure_step(config), QUICKSTART.text.context_length
    real = sum(make_inputs(config, QUICKSTART).text.lengths.tolist())
    assert [row["tokens"] for row in rows] == [5 * round(real / 5), real, 2 + 3 * most]
    assert [row["contender"] for row in rows] == [
        f"ours, {round(real / 5)} tokens each", "ours, real lengths", f"ours, 1 or {most} tokens",
    ]  # fmt: skip
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    # Attention is quadratic: with equally many tokens, captions of different lengths need more operations.
    assert rows[0]["flops"] < rows[1]["flops"] < rows[2]["flops"]


def test_caption_lengths_come_from_real_captions(shared_data: Path) -> None:
    lengths = caption_lengths(StepConfig(), 256)
    assert len(lengths) > 500
    assert 60 < sum(lengths) / len(lengths) < 100
    assert max(lengths) == 256
    inputs = make_inputs(StepConfig(), preset("biomedclip_b16"))
    assert sum(inputs.text.lengths.tolist()) / 16 == pytest.approx(sum(lengths) / len(lengths), rel=0.05)
    # A step takes three forward passes: 17.5 GMAC an image for ViT-B/16, and 85 M weights a token for BERT. The last
    # layers need less.
    total = 3 * (16 * 35e9 + 2 * 85e6 * len(inputs.text.ids))
    assert 0.9 * total < inputs.flops < total


def test_bench_step_writes_rows(histogram: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = StepConfig(preset="quickstart", batch_size=2, lengths=histogram, rounds=1, ablation=False, open_clip=False)
    assert run(BenchConfig(operator="step", output=tmp_path, step=step)) == 0
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [row["contender"] for row in rows] == ["ours", "ours, checkpointed"]
    assert "samples/s" in capsys.readouterr().out
