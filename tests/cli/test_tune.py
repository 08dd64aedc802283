"""Records of backends: made, kept, found, refused where damaged, and what `auto`, runs and the doctor make of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from bclip_fast import doctor, ops, tune
from bclip_fast.errors import UserError
from bclip_fast.loss import ClipLoss
from bclip_fast.ops import dispatch, fingerprint, pointwise, record_files, trial_cases, trials, tuning
from bclip_fast.ops.contrastive import limits
from bclip_fast.ops.record_files import Entry, Record
from bclip_fast.train import backends

CPU = torch.device("cpu")
GELU = ("gelu", "float32", "small")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Records are looked for in an empty cache, and nothing that a test finds there stays."""
    monkeypatch.delenv("BCLIP_TUNE")
    monkeypatch.setenv("BCLIP_CACHE", str(tmp_path / "cache"))
    # Which defaults the package has for this processor is no affair of these tests.
    monkeypatch.setattr(tuning, "DEFAULTS", tmp_path / "defaults")
    tuning.reset()
    yield
    tuning.reset()


def record(*order: str, key=GELU, made="2026-01-01T00:00:00+00:00", **changed: str) -> Record:
    return Record({**fingerprint.fingerprint("cpu"), **changed}, made, {key: Entry(order, {order[0]: 1.0})})


def keep(found: Record) -> Path:
    path = tuning.path_for(fingerprint.fingerprint("cpu"))
    record_files.save(found, path)
    tuning.reset()
    return path


def gelu_takes(rows: int = 2) -> str:
    return dispatch.explain(lambda: ops.gelu(torch.zeros(rows, 2))).chosen


# Files.


def test_a_saved_record_is_read_back_equal(tmp_path):
    written = record("cpu", "reference")
    written.checks["gelu", "float32", "cpu"] = 'off by "much"'
    record_files.save(written, tmp_path / "a" / "record.json")
    found = record_files.load(tmp_path / "a" / "record.json")
    assert dataclasses.replace(found, path=None) == written
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(schema=99), "has schema 99, but this version reads 1"),
        (lambda data: data.pop("entries"), "damaged: KeyError: 'entries'"),
        (lambda data: data["entries"][0].update(order=[3]), "damaged: TypeError: expected a string, got 3"),
        (lambda data: data["fingerprint"].pop("name"), "the fingerprint lacks name"),
        (
            lambda data: data["entries"][0].update(order=["gpu"]),
            "unknown backend 'gpu'; known: triton, cuda",
        ),
        (lambda data: data["entries"][0].update(ms={"gpu": 1.0}), "it names the unknown backend 'gpu'"),
        (
            lambda data: data["checks"].append({"operator": "a", "dtype": "b", "backend": "gpu", "error": ""}),
            "it names the unknown backend 'gpu'",
        ),
    ],
)
def test_a_damaged_record_is_named_with_the_damage(tmp_path, change, words):
    data = record_files.to_json(record("cpu"))
    change(data)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=words) as caught:
        record_files.load(path)
    assert str(path) in str(caught.value)


def test_the_cached_record_decides():
    assert gelu_takes() == "cpu"
    keep(record("reference", "cpu"))
    assert gelu_takes() == "reference"
    # Another class of shapes, of which the record says nothing.
    assert gelu_takes(1 << 17) == "cpu"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', "\0"], ids=repr)
def test_a_broken_cached_record_is_one_warning_and_the_defaults(text, caplog):
    path = keep(record("reference", "cpu"))
    path.write_text(text)
    assert [gelu_takes() for _ in range(3)] == ["cpu"] * 3
    assert [str(path) in line for line in caplog.messages] == [True]


def test_a_record_of_another_device_under_this_ones_name_is_refused(caplog):
    keep(record("reference", "cpu", kernels="others"))
    assert gelu_takes() == "cpu"
    assert "is of another device: kernels others / " in caplog.text


def test_a_changed_library_is_another_record(monkeypatch):
    keep(record("reference", "cpu"))
    assert gelu_takes() == "reference"
    monkeypatch.setattr(torch, "__version__", "9.9")
    tuning.reset()
    assert gelu_takes() == "cpu"
    assert "torch 2" in "\n".join(doctor.lines()) and "/ 9.9" in "\n".join(doctor.lines())


def test_off_reads_no_record(monkeypatch):
    keep(record("reference", "cpu"))
    monkeypatch.setenv("BCLIP_TUNE", "off")
    tuning.reset()
    assert gelu_takes() == "cpu"


def test_a_named_record_is_used_and_one_made_elsewhere_warns(monkeypatch, tmp_path, caplog):
    record_files.save(record("reference", "cpu", threads="64 to 127"), tmp_path / "mine.json")
    monkeypatch.setenv("BCLIP_TUNE", str(tmp_path / "mine.json"))
    assert gelu_takes() == "reference"
    assert "was made on another device or version (there / here): threads 64 to 127 / " in caplog.text


def test_a_named_record_that_is_missing_is_an_error_and_the_doctor_says_it(monkeypatch, tmp_path):
    monkeypatch.setenv("BCLIP_TUNE", str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file"):
        ops.gelu(torch.zeros(2))
    # A named backend needs no record.
    assert ops.gelu(torch.zeros(2), backend="cpu").shape == (2,)
    assert any("none.json cannot be read" in line for line in doctor.lines())


def test_defaults_of_the_instruction_set_are_taken_and_checks_in_them_are_not(tmp_path, monkeypatch):
    found = record("reference", "cpu", name="another")
    found.checks["gelu", "float32", "reference"] = "wrong there"
    record_files.save(found, tuning.DEFAULTS / f"{fingerprint.cpu_architecture()}.json")
    assert gelu_takes() == "reference"
    assert f"the package's defaults for {fingerprint.cpu_architecture()}" in "\n".join(doctor.lines())


@pytest.mark.parametrize("name", sorted(path.name for path in tuning.DEFAULTS.glob("*.json")))
def test_the_packages_defaults_cover_every_call(name):
    found = record_files.load(Path(tuning.__file__).parent / "defaults" / name)
    assert found.fingerprint["architecture"] == Path(name).stem
    assert all(set(entry.order) <= set(dispatch.BACKENDS) for entry in found.entries.values())
    several = {key[0] for key in found.entries}
    assert several >= {"fused_attention", "varlen_attention", "pooled_attention", "clip_loss", "add_norm", "gelu"}


# What calls look up.


def test_every_class_of_shapes_has_a_trial():
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


def test_explaining_a_call_runs_nothing_and_tells_each_refusal():
    decision = dispatch.explain(lambda: ops.gelu(torch.zeros(2, 2, dtype=torch.float64)))
    assert decision.key == ("gelu", "float64", "small") and decision.chosen == "reference"
    assert "float64" in decision.refusals["cpu"] and decision.refusals["cuda"] == "not implemented"
    assert ops.gelu(torch.zeros(2)).shape == (2,)
    with pytest.raises(ValueError, match="reached no operator"):
        dispatch.explain(lambda: None)


def test_seeded_dropout_is_not_left_to_the_reference_by_a_record_of_unseeded_dropout():
    keep(record("reference", "cpu", key=("add_norm", "float32", "dropout, small")))
    rows, weight = torch.zeros(2, 4), torch.ones(4)

    def takes(seed):
        return dispatch.explain(lambda: ops.add_norm(rows, rows, weight, weight, 1e-6, dropout_p=0.5, seed=seed)).chosen

    assert takes(None) == "reference" and takes(3) == "cpu"


def test_a_compiled_call_takes_the_record_in_one_graph():
    keep(record("reference", "cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(ops.gelu, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3, 7):
        x = torch.randn(rows, 5)
        assert torch.equal(compiled(x), torch.nn.functional.gelu(x))


def test_a_record_never_replaces_a_named_backend(monkeypatch):
    keep(record("reference", "cpu"))
    assert dispatch.explain(lambda: ops.gelu(torch.zeros(2), backend="cpu")).chosen == "cpu"
    with ops.use_backend("cpu"):
        assert gelu_takes() == "cpu"
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="cuda: not implemented"):
        ops.gelu(torch.zeros(2))


# Kernels that are checked before their first use.


@pytest.fixture
def planted(monkeypatch):
    """A Triton backend for gelu on the CPU, right unless told otherwise; `calls` counts what it computed."""
    gelu = torch.nn.functional.gelu
    found = types.SimpleNamespace(calls=0, forward=gelu, factor=1.0)

    def forward(x):
        found.calls += 1
        return found.forward(x)

    def backward(grad, x):
        return torch.ops.aten.gelu_backward(grad, x) * found.factor

    module = types.SimpleNamespace(gelu=forward, gelu_backward=backward)
    real = pointwise.load_backend
    monkeypatch.setattr(
        pointwise, "load_backend", lambda name, backend: module if backend == "triton" else real(name, backend)
    )
    monkeypatch.setitem(pointwise.LIMITS, "triton", lambda *inputs: None)
    monkeypatch.delitem(dispatch.MISSING, "triton", raising=False)
    return found


def failing(x):
    raise RuntimeError("PTX of another world\nand more")


def half_off(x):
    return torch.nn.functional.gelu(x) + 0.002 * x


def test_a_right_kernel_is_checked_once_and_taken(planted, caplog):
    x = torch.randn(4, 4)
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ops.gelu(x)
    checked = planted.calls
    assert checked > 1 and torch.equal(torch.get_rng_state(), state)
    ops.gelu(x)
    assert planted.calls == checked + 1 and not caplog.messages
    # The next process finds it in the cache.
    tuning.reset()
    ops.gelu(x)
    assert planted.calls == checked + 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"forward": half_off}, "the result of 37 x 136 float32 has a relative error of"),
        ({"factor": 1.001}, "gradient 0 of 37 x 136 float32 has a relative error of"),
        ({"forward": lambda x: x.float() * float("nan")}, "error of nan"),
        ({"forward": failing}, "RuntimeError: PTX of another world"),
    ],
    ids=["forward", "gradient", "nan", "raises"],
)
def test_a_wrong_kernel_is_never_taken_and_told_once(planted, caplog, fault, words):
    vars(planted).update(fault)
    x = torch.randn(4, 4)
    for _ in range(3):
        assert torch.equal(ops.gelu(x), ops.gelu(x, backend="cpu"))
    (line,) = caplog.messages
    assert line.startswith("gelu in float32 fails its check on ") and "with the backend triton" in line
    assert words in line and "bclip doctor" in line
    assert any("not triton: fails its check on this device" in line or words in line for line in doctor.lines())
    # Remembered in the record, without a second check or a second warning.
    calls = planted.calls
    tuning.reset()
    ops.gelu(x)
    assert planted.calls == calls and len(caplog.messages) == 1
    # A name is a name.
    if "factor" in fault:
        assert ops.gelu(x, backend="triton").isfinite().all() and planted.calls == calls + 1


def test_out_of_memory_in_a_check_is_not_kept(planted, caplog):
    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    planted.forward = full
    ops.gelu(torch.randn(4))
    assert "out of memory" in caplog.text
    planted.forward = torch.nn.functional.gelu
    tuning.reset()
    assert gelu_takes() == "triton"


def test_without_checks_a_kernel_is_taken_as_it_is(planted, monkeypatch):
    monkeypatch.setenv("BCLIP_TUNE", "off")
    tuning.reset()
    planted.forward = half_off
    x = torch.randn(4, 4)
    assert torch.equal(ops.gelu(x), half_off(x)) and planted.calls == 1


def test_a_check_inside_a_compiled_call(planted, caplog):
    planted.forward = half_off
    torch._dynamo.reset()
    compiled = torch.compile(ops.gelu, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5)
    assert torch.equal(compiled(x), ops.gelu(x, backend="cpu"))
    assert len([line for line in caplog.records if line.name.startswith("bclip_fast")]) == 1


def test_every_backend_of_this_machine_passes_its_checks():
    failed = []
    for dtype in trial_cases.dtypes(CPU):
        for trial in trial_cases.small(CPU, dtype):
            refused = trial.decide().refusals
            for name in dispatch.BACKENDS:
                if name not in refused and (fault := trials.fault_of(trial, name)):
                    failed.append(f"{trial.operator}, {name}: {fault}")
    assert failed == []


# The command.


def test_the_command_measures_keeps_and_prints(planted, capsys, caplog):
    planted.forward = half_off
    tune.run(tune.TuneConfig(operators=("gelu",), seconds=0.001))
    path = tuning.path_for(fingerprint.fingerprint("cpu"))
    found = record_files.load(path)
    assert found.fingerprint == fingerprint.fingerprint("cpu") and found.made
    assert {key[0] for key in found.entries} == {"gelu"} and len(found.entries) == 4
    assert (
        found.checks["gelu", "float32", "cpu"] == "" and "relative error" in found.checks["gelu", "float32", "triton"]
    )
    for (_, dtype, _), entry in found.entries.items():
        # In bfloat16 the planted fault is below the rounding.
        right = {"cpu", "reference"} if dtype == "float32" else {"triton", "cpu", "reference"}
        assert set(entry.order) == set(entry.ms) == right and all(ms > 0 for ms in entry.ms.values())
    assert "fails its check with the backend triton" in caplog.text
    out = capsys.readouterr().out
    assert "ours / torch" in out and str(path) in out
    tuning.reset()
    assert tuning.of_device("cpu").origin == "this machine's record"
    text = "\n".join(doctor.lines())
    assert "by this machine's record" in text and str(path) in text and "today" in text
    assert " ms, " in text


def test_the_command_on_some_operators_leaves_the_others(caplog):
    keep(record("reference", "cpu"))
    tune.run(tune.TuneConfig(operators=("add_norm",), seconds=0.001))
    found = record_files.load(tuning.path_for(fingerprint.fingerprint("cpu")))
    assert found.entries[GELU].order == ("reference", "cpu") and {key[0] for key in found.entries} == {
        "gelu",
        "add_norm",
    }


def test_the_command_does_not_mix_devices(tmp_path):
    record_files.save(record("cpu", torch="1.0"), tmp_path / "old.json")
    with pytest.raises(UserError, match=r"old\.json is of another device or version \(torch 1\.0 / "):
        tune.run(tune.TuneConfig(operators=("gelu",), seconds=0.001, out=tmp_path / "old.json"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"operators": ("gelo",)}, "gelo unknown; choose among fused"),
        ({"seconds": 0.0}, "seconds=0.0 must be a finite number above 0"),
        ({"seconds": float("inf")}, "seconds=inf must be a finite number above 0"),
    ],
)
def test_the_command_refuses_by_name(options, words):
    with pytest.raises(UserError, match=words):
        tune.TuneConfig(**options)


def a_damaged_record(folder: Path) -> Path:
    (folder / "damaged.json").write_text("{")
    return folder / "damaged.json"


def a_folder_below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "record.json"


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        (lambda folder: folder, "cannot be read: Is a directory"),
        (a_folder_below_a_file, "cannot be written: .*; --out names another file"),
        (a_damaged_record, "is damaged: .*; measure all operators, or delete the file"),
    ],
)
def test_the_command_refuses_a_bad_destination_before_it_measures(destination, words, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda *args: pytest.fail("measured first"))
    with pytest.raises(UserError, match=words):
        tune.run(tune.TuneConfig(operators=("gelu",), out=destination(tmp_path)))


def test_the_command_refuses_a_directory_as_destination_of_all_operators(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda *args: pytest.fail("measured first"))
    with pytest.raises(UserError, match="cannot be written: it is a directory"):
        tune.run(tune.TuneConfig(out=tmp_path))


def test_the_command_without_a_home_names_the_variable_to_set(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BCLIP_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="no home directory: set BCLIP_CACHE or --out"):
        tune.run(tune.TuneConfig(operators=("gelu",)))


def test_equally_fast_backends_keep_the_packages_order():
    assert tune.ranked({"reference": 1.0, "cpu": 1.04, "torch": 1.2}) == ("cpu", "reference", "torch")
    assert tune.ranked({"reference": 1.0, "cpu": 1.06}) == ("reference", "cpu")


# Runs and ranks.


def test_a_run_keeps_its_choices_whatever_the_machine_says_later(tmp_path):
    keep(record("reference", "cpu"))
    with backends.of_run(tmp_path, resumed=False):
        assert gelu_takes() == "reference" and gelu_takes(1 << 17) == "cpu"
    keep(record("cpu", "reference"))
    assert gelu_takes() == "cpu"
    with backends.of_run(tmp_path, resumed=True):
        assert gelu_takes() == "reference"
        assert "the run's record" in "\n".join(doctor.lines())
    assert gelu_takes() == "cpu"
    with backends.of_run(tmp_path, resumed=False):
        assert gelu_takes() == "cpu"


def test_a_run_whose_backend_is_gone_goes_on_with_another_and_says_so(tmp_path, caplog, monkeypatch):
    with backends.of_run(tmp_path, resumed=False):
        assert gelu_takes() == "cpu"
    assert not caplog.messages
    with backends.of_run(tmp_path, resumed=True):
        pass
    assert not caplog.messages
    monkeypatch.setitem(pointwise.LIMITS, "cpu", lambda *inputs: "it was built without")
    with backends.of_run(tmp_path, resumed=True):
        assert gelu_takes() == "reference"
    assert "does not continue bit for bit" in caplog.text
    assert "gelu, float32, small: reference in place of cpu (it was built without)" in caplog.text


def test_a_damaged_file_of_a_run_is_named(tmp_path):
    (tmp_path / "backends.json").write_text('{"cpu": {}}')
    with pytest.raises(UserError, match=r"backends\.json is damaged"):
        backends.of_run(tmp_path, resumed=True)


def _of_rank(rank: int, folder: str) -> list[str]:
    logging.disable()
    os.environ["BCLIP_CACHE"] = f"{folder}/{rank}"
    os.environ.pop("BCLIP_TUNE", None)
    loss_key = ("clip_loss", "float32", "B <= 256")
    keep(record(*(("reference", "cpu") if rank == 0 else ("cpu", "reference")), key=loss_key))
    features = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)

    def takes() -> str:
        return dispatch.explain(lambda: ops.clip_loss(features, features, 1.0)).chosen

    found = [takes()]
    with backends.of_run(Path(folder), resumed=False):
        found.append(takes())
    found.append(takes())
    ClipLoss(rank=rank, world_size=dist.get_world_size())(features, features, torch.tensor(1.0))
    return [*found, takes()]


def test_all_ranks_take_rank_0s_choice_in_a_run_and_in_a_loss(tmp_path):
    first, second = on_ranks(2, _of_rank, str(tmp_path))
    assert first == ["reference"] * 4
    assert second == ["cpu", "reference", "cpu", "reference"]


def test_importing_the_operators_reads_no_record(tmp_path):
    code = "from bclip_fast import ops; from bclip_fast.ops import tuning; print('read', *tuning._records)"
    environment = {**os.environ, "BCLIP_TUNE": str(tmp_path / "none.json")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "read"


def test_a_resumed_run_without_its_file_of_backends_says_so_and_writes_one(tmp_path, caplog):
    with backends.of_run(tmp_path, resumed=False):
        pass
    assert not caplog.records
    (tmp_path / "backends.json").unlink()
    with backends.of_run(tmp_path, resumed=True):
        pass
    assert "backends.json is missing" in caplog.text and (tmp_path / "backends.json").is_file()
