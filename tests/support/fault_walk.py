"""The walk over the writes of a command: a fault at each one, then checks of all files, and a second run."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from fault_commands import COMMANDS, content, contents, raw
from faults import FaultServer, Outcome, Point

from bclip_fast import pretrained
from bclip_fast.train import checkpoint as checkpoints
from bclip_fast.train.signals import EXIT_STOPPED

REASONS = {"full": "No space left on device", "denied": "Permission denied"}
# Without permission, a command cannot remove its temporary files.
_MAY_LEAVE_FILES = ("denied", "kill")
# A second run goes on from these.
_KEPT = re.compile(r"\.data\.(partial|labels)|\.files\.written|/\.parts/")
_FINISHED = re.compile(r" I (?:saved|wrote|results in|report in|gallery in|\d+ images in) (\S+)$", re.MULTILINE)


class Walk:
    """One command with the state of its folder before and after it.

    points: writes of the command without a fault, in order.
    """

    def __init__(self, server: FaultServer, base: Path, name: str) -> None:
        """base: folder with `inputs`. The command runs in `base`/world, so that every run has the same paths."""
        self.name, self.command = name, COMMANDS[name]
        self._server, self._world, self._start = server, base / "world", base / "start"
        shutil.rmtree(self._world, ignore_errors=True)
        self._world.mkdir()
        for item in (*self.command.inputs, "notes"):
            source = base / "inputs" / item
            (shutil.copytree if source.is_dir() else shutil.copy)(source, self._world / item)
        for argv in self.command.before:
            outcome = server.run(argv, self._world)
            assert outcome.status == 0, outcome.text
        self.command.prepare(self._world)
        # The folder of an output may hold other files.
        for output in self.command.outputs if self.command.before else ():
            place = self._world / output
            (place if place.is_dir() else place.parent).joinpath("user.txt").write_text("kept\n")
        shutil.rmtree(self._start, ignore_errors=True)
        shutil.copytree(self._world, self._start)
        self._before, self._old = raw(self._world), contents(self._world)
        self._readable = self._read()
        outcome = server.run(self.command.argv, self._world)
        assert outcome.status == self.command.status, outcome.text
        self.points = list(dict.fromkeys(outcome.points))
        self._new = contents(self._world)
        assert [name for name in self._old if name.endswith("user.txt") and name not in self._new] == []
        self._allowed = [self._readable, self._read()]
        self._between: dict[str, str] = {}
        self._stop: tuple[str, ...] = ()
        self._known: dict[str, tuple[list[str | None], list[str]]] = {}
        # The state after the first of two checkpoints.
        second = next((point for point in self.points if "step-00000004" in point.path), None)
        if second is not None:
            self._fresh()
            server.run(self.command.argv, self._world, second, "kill")
            self._between = contents(self._world)
            self._allowed.append(self._read())

    def _fresh(self) -> None:
        shutil.rmtree(self._world)
        shutil.copytree(self._start, self._world)

    def _read(self) -> list[str | None]:
        return [self._value(reader) for reader in self.command.readers]

    def _value(self, reader: object) -> str | None:
        try:
            return reader(self._world)  # type: ignore[operator]
        except Exception:
            return None

    def selected(self, fault: str) -> list[Point]:
        """The points of a fault: the first and the last of equal calls on paths that differ at most in numbers."""
        groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
        for point in self.points:
            if point.can(fault):
                groups[point.call, re.sub(r"\d+", "0", point.path)].append(point)
        return [point for group in groups.values() for point in dict.fromkeys((group[0], group[-1]))]

    def sample(self, fault: str, num: int) -> list[Point]:
        """`num` of the selected points: of each kind of call in turn, spread over the command."""
        kinds: dict[str, list[Point]] = defaultdict(list)
        for point in self.selected(fault):
            kinds[point.call].append(point)
        offset = sum(map(ord, self.name + fault))
        calls = sorted(kinds)
        picked = []
        for i in range(num):
            group = kinds[calls[(offset + i) % len(calls)]]
            picked.append(group[(offset + i // len(calls) * 7) % len(group)])
        return list(dict.fromkeys(picked))

    def problems(self, point: Point, fault: str) -> list[str]:
        """Run the command with the fault, then again. Return all that is wrong, each with the fault and its point."""
        self._fresh()
        outcome = self._server.run(self.command.argv, self._world, point, fault)
        if not any((p.call, p.path, p.number) == (point.call, point.path, point.number) for p in outcome.points):
            return [f"{self.name}, {fault} at {point}: the command did not reach this call"]
        self._stop = self._stop_checkpoint() if outcome.status == EXIT_STOPPED else ()
        found = [*self._end(outcome, fault), *self._files(outcome, fault)]
        # From equal files, readers and a second run give equal results. Most faults leave the files as they were.
        state = self._state(fault)
        if state not in self._known:
            self._known[state] = self._read(), self._second_run(fault)
        values, problems = self._known[state]
        for number, value in enumerate(values):
            if not self._stop and value not in [versions[number] for versions in self._allowed]:
                found.append(f"reader {number} finds neither the old nor the new output: {str(value)[:200]}")
        found += problems
        return [f"{self.name}, {fault} at {point}: {text}" for text in found]

    def _stop_checkpoint(self) -> tuple[str, ...]:
        """Folders of the checkpoint that a signal caused, and of its model. They are whole, and no other run has them.

        Raises AssertionError if they are not, because then the walk cannot judge them.
        """
        run = self.command.outputs[0]
        if not checkpoints.list_checkpoints(self._world / run / "checkpoints"):
            return ()
        newest = checkpoints.latest(self._world / run / "checkpoints")
        name = newest.relative_to(self._world).as_posix()
        if any(path.startswith(f"{name}/") for path in (*self._old, *self._new)):
            return ()
        assert checkpoints.verify(newest) is None
        if not (self._world / run / "model").is_dir():
            return (f"{name}/",)
        weights = pretrained.load(self._world / run / "model")[0].state_dict()
        saved = checkpoints.read(newest).model
        assert saved.keys() == weights.keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in saved.items())
        return f"{name}/", f"{run}/model/"

    def _state(self, fault: str) -> str:
        """Return a text that is equal for two folders with equal files, without the times in them."""
        events = [path.read_bytes()[-1:] for path in self._world.rglob("events.jsonl")]
        hidden = {name: digest for name, digest in raw(self._world).items() if "/." in name}
        return f"{fault in _MAY_LEAVE_FILES} {contents(self._world)} {hidden} {events}"

    def _end(self, outcome: Outcome, fault: str) -> list[str]:
        """Check the exit status and the message."""
        lines = [line for line in outcome.text.splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        if "Traceback" in outcome.text or "Exception ignored" in outcome.text:
            return [f"a traceback: {last}"]
        if fault == "kill":
            return [] if outcome.status == -9 else [f"exit status {outcome.status}"]
        if fault == "term":
            is_right = outcome.status in (*self.command.stop_status, 0)
            return [] if is_right else [f"exit status {outcome.status}: {last}"]
        if outcome.status == 0:
            # Without permission, a temporary folder may stay.
            is_complete = _visible(contents(self._world)) == self._new
            is_warned = re.search(r" W .*" + REASONS[fault], outcome.text)
            return [] if is_complete or is_warned else ["success without a warning"]
        if outcome.status != 2 or not last.startswith("bclip ") or REASONS[fault] not in last or "out" not in last:
            return [f"exit status {outcome.status}, message: {last}"]
        return []

    def _files(self, outcome: Outcome, fault: str) -> list[str]:
        found = []
        now = raw(self._world)
        for name, digest in self._before.items():
            if name not in now:
                if not self._is_output(name) or name in self._new:
                    found.append(f"{name} is gone")
            elif now[name] != digest and (not self._is_output(name) or not self._is_version(name)):
                found.append(f"{name} is neither the old nor the new file")
        for name in now.keys() - self._before.keys():
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if not self._is_output(name) and not hidden:
                found.append(f"{name} is no output")
            elif hidden and fault not in _MAY_LEAVE_FILES and not _KEPT.search(name):
                found.append(f"{name} was left behind")
            elif (
                not hidden
                and not self._is_version(name)
                and not (Path(name).name == "lock" and fault in _MAY_LEAVE_FILES)
            ):
                found.append(f"{name} is incomplete")
        for name in _FINISHED.findall(outcome.text):
            is_kept = any(path == name or path.startswith(f"{name}/") for path in self._new)
            if is_kept and not (self._world / name).exists():
                found.append(f"{name} was announced, and is missing")
        return found

    def _is_output(self, name: str) -> bool:
        return any(name == output or name.startswith(f"{output}/") for output in self.command.outputs)

    def _is_version(self, name: str) -> bool:
        """Whether a file has the old content, the new one, or that after the first checkpoint. Lines may be fewer."""
        if self._stop and name.startswith(self._stop):
            return True
        text = content(self._world / name)
        versions = [version[name] for version in (self._old, self._new, self._between) if name in version]
        if not text or text in versions:
            return True
        if name.endswith("metrics.jsonl"):
            lines = (self._world / name).read_bytes().splitlines(keepends=True)
            complete = [json.loads(line)["loss"] for line in lines if line.endswith(b"\n")]
            return any([row[1] for row in json.loads(version)][: len(complete)] == complete for version in versions)
        return False

    def _second_run(self, fault: str) -> list[str]:
        """Run the command again, as a user would, and compare its outputs with those of a run without a fault."""
        command = self.command
        outcome = self._server.run(command.again or command.argv, self._world)
        now = contents(self._world)
        if fault in _MAY_LEAVE_FILES:
            now = _visible(now)  # the next write of the same path removes what is left
        differing = sorted(name for name in now.keys() | self._new.keys() if now.get(name) != self._new.get(name))
        # A command that ended before its last write may refuse to write a finished output again.
        if outcome.status not in (command.status, 2) or (outcome.status == 2 and differing):
            return [f"the second run ended with {outcome.status}: {outcome.text.strip().splitlines()[-1:]}"]
        return [f"after the second run, these differ: {', '.join(differing[:4])}"] if differing else []


def _visible(files: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in files.items() if "/." not in name}
