"""Tests of the tuning records: their files, and the backend that a call takes from them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from records import GELU, gelu_backend, keep, make_record
from torch._subclasses.fake_tensor import FakeTensorMode

from bclip_fast import ops, tune
from bclip_fast.doctor import backends as doctor
from bclip_fast.errors import UserError
from bclip_fast.ops import dispatch, fingerprint, record_files, trials, tuning
from bclip_fast.ops.attention import sdpa_kernels
from bclip_fast.ops.backend_names import SDPA
from bclip_fast.ops.contrastive import limits
from bclip_fast.ops.record_files import FROM_BOUNDS, Entry, Record

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("fresh_records")


def test_load_saved_record_is_equal(tmp_path):
    written = make_record("cpu", "reference")
    written.checks["gelu", "float32", "cpu"] = 'off by "much"'
    record_files.save(written, tmp_path / "a" / "record.json")
    loaded = record_files.load(tmp_path / "a" / "record.json")
    assert dataclasses.replace(loaded, path=None) == written
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(schema=99), "has schema 99, but this version reads 1"),
        (lambda data: data.pop("entries"), "damaged: KeyError: 'entries'"),
        (lambda data: data["entries"][0].update(order=[3]), "damaged: TypeError: expected a string, got 3"),
        (lambda data: data["fingerprint"].pop("name"), "the fingerprint lacks name"),
        (lambda data: data.update(source="hearsay"), "it names the unknown source 'hearsay'; known: bounds"),
        (lambda data: data["entries"][0].update(bound_ms={"gpu": 1.0}), "it names the unknown backend 'gpu'"),
        (lambda data: data["entries"][0].update(order=["gpu"]), "unknown backend 'gpu'; known: triton, cuda"),
        (lambda data: data["entries"][0].update(ms={"gpu": 1.0}), "it names the unknown backend 'gpu'"),
        (
            lambda data: data["checks"].append({"operator": "a", "dtype": "b", "backend": "gpu", "error": ""}),
            "it names the unknown backend 'gpu'",
        ),
    ],
)
def test_load_damaged_record_names_file_and_damage(tmp_path, change, words):
    data = record_files.to_json(make_record("cpu"))
    change(data)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=words) as caught:
        record_files.load(path)
    assert str(path) in str(caught.value)


def test_cached_record_selects_backend():
    assert gelu_backend() == "cpu"
    keep(make_record("reference", "cpu"))
    assert gelu_backend() == "reference"
    # The record has no entry for this class of shapes.
    assert gelu_backend(1 << 17) == "cpu"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', "\0"], ids=repr)
def test_broken_cached_record_warns_once_and_uses_defaults(text, caplog):
    path = keep(make_record("reference", "cpu"))
    path.write_text(text)
    assert [gelu_backend() for _ in range(3)] == ["cpu"] * 3
    assert [str(path) in line for line in caplog.messages] == [True]


def test_cached_record_of_another_device_is_refused(caplog):
    keep(make_record("reference", "cpu", kernels="others"))
    assert gelu_backend() == "cpu"
    assert "is of another device: kernels others / " in caplog.text


def test_cached_record_of_another_torch_is_ignored(monkeypatch):
    keep(make_record("reference", "cpu"))
    assert gelu_backend() == "reference"
    monkeypatch.setattr(torch, "__version__", "9.9")
    tuning.reset()
    assert gelu_backend() == "cpu"
    assert "torch 2" in "\n".join(doctor.lines()) and "/ 9.9" in "\n".join(doctor.lines())


def test_tuning_off_ignores_cached_record(monkeypatch):
    keep(make_record("reference", "cpu"))
    monkeypatch.setenv("BCLIP_TUNE", "off")
    tuning.reset()
    assert gelu_backend() == "cpu"


def test_named_record_made_elsewhere_is_used_with_warning(monkeypatch, tmp_path, caplog):
    record_files.save(make_record("reference", "cpu", threads="64 to 127"), tmp_path / "mine.json")
    monkeypatch.setenv("BCLIP_TUNE", str(tmp_path / "mine.json"))
    assert gelu_backend() == "reference"
    assert "was made on another device or version (there / here): threads 64 to 127 / " in caplog.text


def test_named_record_missing_raises_and_shows_in_doctor(monkeypatch, tmp_path):
    monkeypatch.setenv("BCLIP_TUNE", str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file"):
        ops.gelu(torch.zeros(2))
    # A named backend needs no record.
    assert ops.gelu(torch.zeros(2), backend="cpu").shape == (2,)
    assert any("none.json cannot be read" in line for line in doctor.lines())


def test_package_defaults_select_backend_without_their_checks(tmp_path, monkeypatch):
    record = make_record("reference", "cpu", name="another")
    record.checks["gelu", "float32", "reference"] = "wrong there"
    record_files.save(record, tuning.DEFAULTS / f"{fingerprint.cpu_architecture()}.json")
    assert gelu_backend() == "reference"
    assert f"the package's defaults for {fingerprint.cpu_architecture()}" in "\n".join(doctor.lines())


A100 = {
    "device": "cuda",
    "name": "NVIDIA A100-SXM4-40GB",
    "architecture": "sm_80",
    "torch": torch.__version__,
    "kernels": "some build",
}


@pytest.fixture
def a100(monkeypatch):
    """A machine with an A100 and the package's defaults."""
    monkeypatch.setattr(tuning, "fingerprint", lambda kind, index=0: A100 if kind == "cuda" else {"device": kind})
    monkeypatch.setattr(tuning, "emulated", lambda: False)
    monkeypatch.setattr(sdpa_kernels, "compute_capability", lambda index: (8, 0))
    monkeypatch.setattr(tuning, "DEFAULTS", Path(tuning.__file__).parent / "defaults")
    tuning.reset()


def order_on_gpu(operator, shapes, dtype=torch.float16):
    return tuning.order(operator, "cuda", 0, dtype, shapes, dispatch.BACKENDS)


def test_gpu_without_record_takes_order_of_the_bounds(a100):
    """On an A100, the CUDA kernels of large losses and of attention have lower bounds than Triton's."""
    assert dispatch.BACKENDS[:2] == ("triton", "cuda")
    assert order_on_gpu("clip_loss", "B > 1024")[:2] == ("cuda", "triton")
    assert order_on_gpu("varlen_attention", "d <= 64, N <= 512", torch.bfloat16)[:2] == ("cuda", "triton")
    # The bounds don't cover float32.
    assert order_on_gpu("clip_loss", "B > 1024", torch.float32) == dispatch.BACKENDS
    record = tuning.of_device("cuda")
    assert record.origin == "the package's defaults for sm_80, from bounds, not measured"
    # Bounds are no times, and no check has passed on this device.
    assert not record.made and not record.checks and not any(entry.ms for entry in record.entries.values())
    assert doctor._record(record)[0] == f"by {record.origin}"


def test_measured_record_of_gpu_replaces_order_of_the_bounds(a100):
    key = ("clip_loss", "float16", "B > 1024")
    measured = Record(A100, "2026-01-01T00:00:00+00:00", {key: Entry(("triton", "cuda"), {"triton": 1.0, "cuda": 2.0})})
    record_files.save(measured, tuning.path_for(A100))
    assert order_on_gpu(key[0], key[2])[:2] == ("triton", "cuda")
    assert tuning.of_device("cuda").origin == "this machine's record"
    # It has no entry for other calls, and the bounds don't fill in.
    assert order_on_gpu("fused_attention", "d <= 64, N <= 512") == dispatch.BACKENDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_without_our_kernels_takes_torchs_for_every_layer(a100, monkeypatch, dtype):
    """The definition never runs. It would wait for the GPU, or compute in many small steps."""
    monkeypatch.setattr(dispatch, "MISSING", dict.fromkeys(("triton", "cuda", "cpu"), "not built"))

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode():
        qkv, bounds, rows = new(9, 3, 4, 64), new(3, dtype=torch.int32), new(2, dtype=torch.int64)
        stream, weight = new(9, 64, dtype=torch.float32), new(64, dtype=torch.float32)
        calls = [
            lambda: ops.gelu(qkv),
            lambda: ops.add_norm(stream, new(9, 64), weight, weight, 1e-6, dtype=dtype),
            lambda: ops.add_norm(stream, new(9, 64), weight, weight, 1e-6, dropout_p=0.1),
            lambda: ops.fused_attention(new(1, 9, 3, 4, 64)),
            lambda: ops.varlen_attention(qkv, bounds, 9),
            lambda: ops.single_query_attention(new(2, 4, 64), new(9, 2, 4, 64), rows, bounds),
            lambda: ops.single_query_attention(new(2, 4, 64), new(9, 2, 4, 64), rows, bounds, dropout_p=0.1, seed=3),
        ]
        decisions = [dispatch.explain(call) for call in calls]
    assert [each.chosen for each in decisions] == ["torch"] * len(calls)
    assert {each.refusals["triton"] for each in decisions} == {"not built"}


def test_record_of_gpu_can_put_one_kernel_of_torch_first(a100):
    """The defaults from bounds know no bound of torch's kernels, so they come after our kernels and torch's choice."""
    key = ("fused_attention", "float16", "d <= 64, N <= 512")
    unmeasured = order_on_gpu(key[0], key[2])
    assert unmeasured.index("torch") < min(map(unmeasured.index, SDPA)) < unmeasured.index("reference")
    entry = Entry(("sdpa_cudnn", "cuda", "sdpa_flash"), {"sdpa_cudnn": 1.0, "cuda": 2.0, "sdpa_flash": 3.0})
    checks = {(*key[:2], "sdpa_efficient"): "wrong"}
    record_files.save(Record(A100, "2026-01-01T00:00:00+00:00", {key: entry}, checks), tuning.path_for(A100))
    tuning.reset()
    order = order_on_gpu(key[0], key[2])
    assert order[:3] == entry.order and "sdpa_efficient" not in order


def test_record_from_bounds_is_loaded_as_saved(tmp_path):
    entries = {GELU: Entry(("cuda", "triton"), bound_ms={"cuda": 0.5, "triton": 0.75})}
    written = Record({"device": "cuda", "name": "bounds", "architecture": "sm_80"}, "", entries, source=FROM_BOUNDS)
    record_files.save(written, tmp_path / "record.json")
    assert dataclasses.replace(record_files.load(tmp_path / "record.json"), path=None) == written


@pytest.mark.parametrize("name", sorted(path.name for path in tuning.DEFAULTS.glob("*.json")))
def test_package_defaults_cover_every_operator(name):
    record = record_files.load(Path(tuning.__file__).parent / "defaults" / name)
    assert record.fingerprint["architecture"] == Path(name).stem
    assert all(set(entry.order) <= set(dispatch.BACKENDS) for entry in record.entries.values())
    operators = {key[0] for key in record.entries}
    assert operators >= {"fused_attention", "varlen_attention", "pooled_attention", "clip_loss", "add_norm", "gelu"}


def test_trials_cover_every_class_of_shapes():
    keys = {decision.key for decision in trials.decisions(CPU)}
    classes = {operator: {shapes for name, _, shapes in keys if name == operator} for operator, *_ in keys}
    sizes = {f"d {dim} 64, N {tokens} 512" for dim in ("<=", ">") for tokens in ("<=", ">")}
    assert classes["fused_attention"] == classes["varlen_attention"] == sizes
    batches = {limits.shape_class(torch.empty(n, 1)) for n in (1, 256, 257, 1024, 1025, 10**6)}
    assert classes["clip_loss"] == classes["siglip_loss"] == batches
    assert classes["gelu"] == {"small", "large"} and classes["linear"] == {"few rows", "many rows"}
    assert classes["add_norm"] == {"small", "large", "dropout, small", "dropout, large"}
    operators = {operator.partition(".")[0] for operator in classes}
    assert operators == set(tune.OPERATORS)


def test_explain_gives_every_refusal_and_runs_nothing():
    decision = dispatch.explain(lambda: ops.gelu(torch.zeros(2, 2, dtype=torch.float64)))
    assert decision.key == ("gelu", "float64", "small") and decision.chosen == "torch"
    assert "float64" in decision.refusals["cpu"] and decision.refusals["cuda"] == "not implemented"
    assert ops.gelu(torch.zeros(2)).shape == (2,)
    with pytest.raises(ValueError, match="reached no operator"):
        dispatch.explain(lambda: None)


def test_record_of_unseeded_dropout_ignored_for_seeded_dropout():
    keep(make_record("reference", "cpu", key=("add_norm", "float32", "dropout, small")))
    rows, weight = torch.zeros(2, 4), torch.ones(4)

    def backend(seed):
        return dispatch.explain(lambda: ops.add_norm(rows, rows, weight, weight, 1e-6, dropout_p=0.5, seed=seed)).chosen

    assert backend(None) == "reference" and backend(3) == "cpu"


def test_compiled_call_uses_record_in_one_graph():
    keep(make_record("reference", "cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(ops.gelu, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3, 7):
        x = torch.randn(rows, 5)
        assert torch.equal(compiled(x), torch.nn.functional.gelu(x))


def test_record_does_not_replace_named_backend(monkeypatch):
    keep(make_record("reference", "cpu"))
    assert dispatch.explain(lambda: ops.gelu(torch.zeros(2), backend="cpu")).chosen == "cpu"
    with ops.use_backend("cpu"):
        assert gelu_backend() == "cpu"
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="cuda: not implemented"):
        ops.gelu(torch.zeros(2))


def test_import_of_operators_reads_no_record(tmp_path):
    code = "from bclip_fast import ops; from bclip_fast.ops import tuning; print('read', *tuning._records)"
    environment = {**os.environ, "BCLIP_TUNE": str(tmp_path / "none.json")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "read"
