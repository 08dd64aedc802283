"""After any failure of a write, every file that existed before is whole, and so is everything finished before it.

A full disk, a missing permission, SIGTERM and SIGKILL are injected at the writes of each command. After each fault:

- files that the command does not write are byte for byte the same. Its outputs are the old or the new ones, and the
  package's readers read them.
- the command ended with its exit status and one line that names the path and the reason.
- a handled failure left no temporary files.
- the same command, run again, gives the outputs of a run without a fault, and no other file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_commands import COMMANDS, MODULES, contents, raw, write_inputs
from fault_walk import REASONS, Walk
from faults import FAULTS, FaultServer, Point

from bclip_fast.io.atomic import settle

# Moments at which a simpler design loses something: between the renames of files that belong together, and between a
# checkpoint and its model.
_PINNED = {
    "ingest build --overwrite": [("kill", Point("unlink", "out/data/lock", 1))],
    "train": [("full", Point("rename", "out/run/model/.files.written", 2))],
    "embed again": [("kill", Point("rename", "out/index/embeddings.parquet", 1))],
}
# The faults that each command meets in `make test`, at one write. `make test-all` tries all faults at all writes.
_SAMPLED = {
    "ingest build --overwrite": ("full", "term"),
    "train": ("denied", "term"),
    "finetune --resume": ("full", "kill"),
    "eval": ("denied", "kill"),
    "embed again": ("full", "term"),
    "export": ("denied", "kill"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "inputs").mkdir()
    write_inputs(folder / "inputs")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    server = FaultServer(tmp_path_factory.mktemp("server"), MODULES)
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", _SAMPLED)
def test_fault_at_sampled_write_loses_nothing(server: FaultServer, base: Path, name: str) -> None:
    walk = Walk(server, base, name)
    sampled = [(fault, point) for fault in _SAMPLED[name] for point in walk.sample(fault, 1)]
    problems = [problem for fault, point in sampled + _PINNED.get(name, []) for problem in walk.problems(point, fault)]
    assert not problems, "\n".join(problems)


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", COMMANDS)
def test_fault_at_any_write_loses_nothing(server: FaultServer, base: Path, name: str, fault: str) -> None:
    walk = Walk(server, base, name)
    points = walk.selected(fault)
    problems = [problem for point in points for problem in walk.problems(point, fault)]
    print(f"{name}, {fault}: {len(points)} points")
    assert points and problems == []


_PRIMITIVES = {
    "file": {"out/file": "old"},
    "small_file": {},
    "folder": {"out/folder/file": "old", "out/folder/gone": "old"},
    "files": {"out/folder/file": "old", "out/folder/deep/file": "old", "out/folder/kept": "old"},
    "lines": {"out/lines.jsonl": '{"old": 1}\n{"old": 2'},
}
_LINES = '{"new": 1}\n{"new": 2}\n{"new": 3}\n'


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    server = FaultServer(tmp_path_factory.mktemp("server"), ["fault_primitives"])
    yield server
    server.close()


@pytest.mark.parametrize("name", _PRIMITIVES)
def test_fault_in_atomic_write_leaves_old_or_new(small_server: FaultServer, tmp_path: Path, name: str) -> None:
    """Every call of every function of io/atomic.py and io/jsonl.py, with every fault."""
    call, world = ("call", f"fault_primitives:{name}"), tmp_path / "world"
    lines = world / "out/lines.jsonl"

    def start() -> None:
        shutil.rmtree(world, ignore_errors=True)
        (world / "out").mkdir(parents=True)
        for path, text in _PRIMITIVES[name].items():
            (world / path).parent.mkdir(parents=True, exist_ok=True)
            (world / path).write_text(text)

    start()
    old = contents(world)
    outcome = small_server.run(call, world)
    new, points = contents(world), outcome.points
    assert outcome.status == 0 and new != old
    wrong = []
    for point, fault in ((point, fault) for point in points for fault in FAULTS if point.can(fault)):
        start()
        outcome = small_server.run(call, world, point, fault)
        hidden = [path for path in raw(world) if "/." in path and "/.files.written/" not in path]
        settle(world / "out/folder")
        after = {path: text for path, text in contents(world).items() if "/." not in path}
        second = small_server.run(call, world)
        problems = []
        if fault == "term":
            problems += [f"status {outcome.status}"] * (outcome.status != -15)
        elif fault == "kill":
            problems += [f"status {outcome.status}"] * (outcome.status != -9)
        elif REASONS[fault] not in outcome.text and after != new:
            problems += [f"status {outcome.status}, {outcome.text!r}"]
        elif hidden and fault == "full":  # without permission, they cannot be removed
            problems += [f"left {hidden}"]
        if name == "lines":
            if not lines.read_text().startswith('{"old": 1}\n{"new": 1}\n') or not lines.read_text().endswith(_LINES):
                problems += [f"left the lines {lines.read_text()!r}"]
        elif after not in (old, new) or contents(world) != new:
            problems += [f"left {sorted(after)}, then {sorted(raw(world))}"]
        if second.status:
            problems += [f"second run: {second.status}, {second.text!r}"]
        wrong += [f"{fault} at {point}: {problem}" for problem in problems]
    assert wrong == []
