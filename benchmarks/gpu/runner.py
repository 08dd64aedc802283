"""Run the steps, each with its time limit, and keep their output and outcomes."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any
from xml.etree import ElementTree

from .needs import REQUIRED, missing
from .steps import ROOT, Setting, Step

# A rehearsal runs beside other tests, so its limit only ends a step that hangs.
REHEARSAL_LIMIT = 400
# The steps on which all others depend.
BUILDS = ("build", "emulator")
TAIL_LINES = 25
# Signals that end a run. It then kills the processes of its steps and still writes its table.
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """The end of a step.

    failure: reason, or "". skipped: why the step did not run, or "".
    tests: number of tests by result, for a step of tests.
    """

    name: str
    what: str
    seconds: float
    failure: str = ""
    skipped: str = ""
    tests: Mapping[str, int] | None = None

    @property
    def word(self) -> str:
        """The outcome in words."""
        return f"FAILED: {self.failure}" if self.failure else f"not run: {self.skipped}" if self.skipped else "ok"


class Process:
    """A step's process, which writes its output to the end of a log."""

    def __init__(self, step: Step, environment: Mapping[str, str], log: Path) -> None:
        self.start, self.log, self.offset = monotonic(), log, log.stat().st_size if log.exists() else 0
        self.problem, self.process, self.has_ended = "", None, False
        with open(log, "ab") as output:
            try:
                self.process = subprocess.Popen(
                    step.command, cwd=ROOT, env={**environment, **step.environment}, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
            except OSError as error:
                self.problem = str(error)

    def wait(self, limit: float) -> str:
        """Wait until the process ends or `limit` seconds pass. Return the reason of a failure, or "".

        Kill its whole process group at the end. A program that a sanitizer left behind would disturb the next
        measurement.
        """
        if self.process is None:
            return self.problem
        try:
            status = self.process.wait(max(limit, 0.1))
            if status < 0:
                return f"killed by {signal.Signals(-status).name}"
            return f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            self.kill()
            # From now on, the system may give the number to another process.
            self.has_ended = True
            self.process.wait()

    def kill(self) -> None:
        """Kill the process group, unless `wait` did."""
        if self.process is not None and not self.has_ended:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def tail(self, lines: int = TAIL_LINES) -> str:
        """Return the end of the output."""
        with open(self.log, "rb") as file:
            file.seek(self.offset)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def run_steps(steps: Sequence[Step], setting: Setting, environment: Mapping[str, str]) -> list[Outcome]:
    """Run the steps in order, and report each one as soon as it ends. After a signal of `ENDINGS`, no other step runs.

    A step may also use the time that earlier steps left over. All output goes to OUT/gpu.log. A rehearsal measures
    nothing, so it runs two steps at a time.
    """
    setting.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(setting, environment, Path(folder))
        with run.ended_by_signals():
            if not setting.rehearsal:
                return [outcome for step in steps for outcome in run.one_by_one(step)]
            builds = [step for step in steps if step.beside or step.name in BUILDS]
            outcomes = [outcome for step in builds for outcome in run.one_by_one(step)]
            with ThreadPoolExecutor(2) as pool:
                others = pool.map(run.apart, [step for step in steps if step not in builds])
                return outcomes + [report(outcome, tail) for outcome, tail in others]


class _Run:
    def __init__(self, setting: Setting, environment: Mapping[str, str], folder: Path) -> None:
        self.setting, self.environment, self.folder = setting, environment, folder
        self.log, self.lock = setting.out / "gpu.log", threading.Lock()
        self.start, self.allowed = monotonic(), 0.0
        self.beside: list[tuple[Step, Process]] = []
        self.processes: list[Process] = []
        self.ending = ""  # "stopped by SIGTERM" after such a signal

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Let a signal of `ENDINGS` kill the running steps. After an exception, kill them too."""
        # nohup ignores SIGHUP, and a shell's background job SIGINT.
        heeded = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self.end) for number in heeded}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for process in self.processes:
                process.kill()

    def end(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        self.ending = self.ending or f"stopped by {signal.Signals(number).name}"
        for process in list(self.processes):
            process.kill()

    def started(self, step: Step, log: Path) -> Process:
        """Start a step's process."""
        process = Process(step, self.environment, log)
        self.processes.append(process)
        if self.ending:  # the signal came before the process was in the list
            process.kill()
        return process

    def one_by_one(self, step: Step) -> Iterator[Outcome]:
        """Run a step, whose output goes to the log at once. Yield also the outcomes of steps beside it."""
        if step.beside and not self.ending and not missing(step, self.setting):
            self.beside.append((step, self.started(step, self.folder / f"{step.name}.log")))
            return
        self.allowed += step.seconds
        limit = REHEARSAL_LIMIT if self.setting.rehearsal else self.start + self.allowed - monotonic()
        self.append(heading(step))
        yield report(*self.outcome(step, self.log, limit))
        for other, process in self.beside:
            limit = max(other.seconds - (monotonic() - process.start), 0.0)
            failure = process.wait(limit)
            failure = self.ending or failure
            self.append(f"{heading(other)}{process.tail(1000)}\n")
            yield report(Outcome(other.name, other.what, monotonic() - process.start, failure), process.tail())
        self.beside.clear()

    def apart(self, step: Step) -> tuple[Outcome, str]:
        """Run a step of a rehearsal. Its output goes to the log at its end, so that no two steps mix."""
        own = self.folder / f"{step.name}.log"
        own.touch()
        outcome, tail = self.outcome(step, own, REHEARSAL_LIMIT)
        self.append(heading(step) + own.read_text(errors="replace"))
        return outcome, tail

    def outcome(self, step: Step, log: Path, limit: float) -> tuple[Outcome, str]:
        """Run a step, and return its outcome and the end of its output."""
        if self.ending:
            return Outcome(step.name, step.what, 0.0, f"not run, {self.ending}"), ""
        if absent := missing(step, self.setting):
            reason = f"no {', '.join(absent)}"
            fatal = self.setting.rehearsal or any(name in REQUIRED for name in absent)
            return Outcome(step.name, step.what, 0.0, *((reason, "") if fatal else ("", reason))), ""
        path = self.folder / f"{step.name}.xml"
        if "pytest" in step.command:
            step = replace(step, command=[*step.command, f"--junitxml={path}"])
        process = self.started(step, log)
        failure = process.wait(limit)
        failure = self.ending or failure
        seconds, tests = monotonic() - process.start, counts(path)
        if (
            not failure
            and tests is not None
            and not tests["passed"]
            and not (self.setting.rehearsal and tests["skipped"])
        ):
            failure = "no test passed"
        return Outcome(step.name, step.what, seconds, failure, tests=tests), process.tail()

    def append(self, text: str) -> None:
        """Append to the log."""
        with self.lock, open(self.log, "a") as file:
            file.write(text)


def heading(step: Step) -> str:
    """Return the lines of the log before a step's output."""
    return f"\n==== {step.name}: {step.what}\n$ {' '.join(step.command)}\n"


def report(outcome: Outcome, tail: str) -> Outcome:
    """Print the outcome of a step, and the end of its output if it failed."""
    tests = "" if outcome.tests is None else ", " + in_words(outcome.tests)
    print(f"== {outcome.name}: {outcome.word}, {outcome.seconds:.0f} s{tests}", flush=True)
    if outcome.failure and tail:
        print(tail, flush=True)
    return outcome


def counts(report: Path) -> dict[str, int] | None:
    """Return the number of tests by result in a report of pytest. None if it wrote none, or only a part."""
    try:
        suites: Any = ElementTree.parse(report).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return None
    total, failed, skipped = 0, 0, 0
    for suite in suites:
        total += int(suite.get("tests"))
        failed += int(suite.get("failures")) + int(suite.get("errors"))
        skipped += int(suite.get("skipped"))
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def in_words(tests: Mapping[str, int]) -> str:
    """Return the numbers of tests in words."""
    return ", ".join(f"{number} {word}" for word, number in tests.items() if number or word == "passed")
