"""The folder of a training run. `RunFolder` decides what a command may do with it, and writes all of its files.

config.toml                 resolved configuration, which the command accepts again
backends.json               the operators' backends, which --resume keeps
tokenizer/                  of `bclip train`
metrics.jsonl, events.jsonl, tb/, wandb/, wandb_id
checkpoints/step-XXXXXXXX/
model/                      in open_clip's layout. `bclip train` writes it with each checkpoint
model_ema/                  the same with the EMA, if `ema_decay` is set
vqa/                        the head of `bclip finetune` on questions
classifier/, splits.csv     the head of `bclip finetune` on classes, and the samples of each split
report.html, eval/          its evaluation
bad_samples.jsonl           damaged samples that were replaced
dumps/step-XXXXXXXX/        the step at which `bclip train` gave up (replay.py)

A command first compares itself with the records of the run (resume_rules.py), and builds all of its parts. Nothing of
the folder changes before all ranks have accepted the run and call `begin`.

The records of the run are in config.toml, and in the key `run` of each checkpoint's state.json:

    command       train or finetune
    config        configuration by dotted names
    environment   versions, devices and number of ranks
    changes       [{step, name, recorded, asked}] of all resumes so far
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bclip_fast import config as config_files
from bclip_fast import distributed, pretrained
from bclip_fast.distributed import run_on_rank0
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing_files
from bclip_fast.model.tokenizer import Tokenizer

from . import backends, resume_rules
from . import checkpoint as checkpoints
from .bad_samples import BadSamples
from .config import CheckpointConfig, LogConfig
from .engine.config import DTYPES
from .environment import environment
from .metrics import MetricsLog
from .resume_rules import FIXED, Change, Rule

log = logging.getLogger(__name__)

_CONFIG = "config.toml"


@dataclass(frozen=True)
class Records:
    """The records of the checkpoint from which a run is resumed.

    config: configuration by dotted names.
    changes: the changes at earlier resumes.
    """

    step: int
    command: str
    config: dict[str, Any]
    environment: dict[str, str]
    changes: list[dict[str, Any]] = field(default_factory=list)


class RunFolder:
    """The folder of a run, for the command that writes it. Build it on every rank. Collective.

    Args:
        command: train or finetune.
        resume: continue from the newest intact checkpoint, if there is one.

    Raises:
        UserError: the folder holds a run, or other files, and `resume` is False. Or it can't be resumed: all
            checkpoints are damaged, or it is a run of another command. Or its model would be overwritten.
    """

    def __init__(self, path: Path, command: str, resume: bool) -> None:
        self.path, self.command = path, command
        # Rank 0 hashes the checkpoints and chooses, so that all ranks read the same one.
        self.records: Records | None = run_on_rank0(lambda: self._inspect(resume))
        self.changes: list[dict[str, Any]] = list(self.records.changes) if self.records else []
        self.new_changes: list[Change] = []
        self._saved: dict[str, Any] = {}

    def _inspect(self, resume: bool) -> Records | None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise UserError(f"run={path} is a file; choose another run folder")
        try:
            names = sorted(entry.name for entry in path.iterdir() if entry.name[0] != ".") if path.is_dir() else []
        except OSError as error:
            raise UserError(f"run={path} cannot be read: {error.strerror}; choose another run folder") from error
        used = bool(checkpoints.list_checkpoints(path / "checkpoints"))
        if not resume and used:
            raise UserError(f"{path} holds a run already; add --resume to continue it, or choose another run folder")
        if not resume and names:
            raise UserError(
                f"run={path} is not an empty folder: it holds {names[0]}; choose another run folder, or add --resume "
                "to start a run in it"
            )
        if used:
            return self._read_records()
        if models := [name for name in ("model", "vqa", "classifier") if name in names]:
            raise UserError(
                f"cannot resume {path}: it holds a trained {models[0]}/ but no checkpoint, and a new run would "
                "overwrite it; choose another run folder"
            )
        if _CONFIG in names and _command_of(config_files.read_toml(path / _CONFIG)) != self.command:
            raise UserError(
                f"run={path} holds a {_CONFIG} that is not of a run of `bclip {self.command}`; choose another folder"
            )
        return None

    def _read_records(self) -> Records:
        checkpoint = checkpoints.latest(self.path / "checkpoints")
        state = checkpoints.read_state(checkpoint)
        try:
            run = state.get("run")
            if not run:
                # An earlier version wrote the checkpoint.
                command = "finetune" if "texts" in state["data"] else "train"
                config = resume_rules.flat(config_files.read_toml(self.path / _CONFIG, "configuration of the run"))
                run = {"command": command, "config": config, "environment": {}}
            records = Records(state["step"], run["command"], run["config"], run["environment"], run.get("changes", []))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{checkpoint / 'state.json'} is not of a checkpoint: {error!r}") from error
        if records.command != self.command:
            raise UserError(
                f"cannot resume {self.path}: it is a run of `bclip {records.command}`, not of `bclip {self.command}`; "
                "choose another run folder"
            )
        return records

    @property
    def recorded_precision(self) -> Any:
        """The precision of the run so far. None for a new run."""
        precision = self.records.config.get("engine.precision") if self.records else None
        return precision if precision in DTYPES else None

    def compare(self, config: Any) -> None:
        """Compare a configuration with the records of the run, and list the differences in the log. Collective.

        Args:
            config: resolved configuration with a field `allow_changes`.

        Raises:
            UserError: on every rank, if the run can't be resumed with this configuration, or if the ranks have
                different ones.
        """
        self._compare_ranks(config)
        now = environment()
        if self.records is not None:
            settings = resume_rules.changed_settings(self.command, self.records.config, config)
            self.new_changes = [*settings, *resume_rules.changed_environment(self.records.environment, now)]
            if distributed.is_main():
                for change in self.new_changes:
                    log.warning("resuming %s with other %s", self.path, change)
            resume_rules.check(str(self.path), settings, config.allow_changes)
            self.changes += [{"step": self.records.step, **change.as_json()} for change in self.new_changes]
        self._saved = {
            "command": self.command,
            # A resumed run has the records of one without interruption.
            "config": resume_rules.flat(dataclasses.replace(_to_record(config), resume=False)),
            "environment": now,
            "changes": self.changes,
        }

    def _compare_ranks(self, config: Any) -> None:
        """Check that all ranks have the same settings, except free ones and the places of data."""
        rules = (FIXED, Rule.ARITHMETIC)
        decisive = {
            name: value
            for name, value in resume_rules.flat(config).items()
            if resume_rules.rule_of(self.command, name) in rules
        }
        first, *others = distributed.all_gather_object(decisive)
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                if first.get(name) != other.get(name):
                    raise UserError(
                        f"rank {rank} was started with {name}={other.get(name)}, but rank 0 with "
                        f"{name}={first.get(name)}; start all ranks with the same settings"
                    )

    def read_tokenizer(self, context_length: int) -> Tokenizer:
        """The tokenizer of a resumed run of `bclip train`. Raises UserError if it can't be read."""
        return Tokenizer.from_file(self.path / "tokenizer" / "tokenizer.json", context_length)

    def read_checkpoint(self) -> checkpoints.Checkpoint | None:
        """The checkpoint from which the run continues. None for a new run."""
        if self.records is None:
            return None
        return checkpoints.read(self.path / "checkpoints" / f"step-{self.records.step:08d}")

    def begin(
        self,
        config: Any,
        backend_records: Mapping[str, Any],
        *,
        tokenizer: Tokenizer | None = None,
        log_config: LogConfig | None = None,
        max_bad_samples: int,
    ) -> tuple[MetricsLog | None, BadSamples]:
        """Begin to write: configuration, backends, logs. Call it when everything else is ready. Collective.

        Lines of the logs after the checkpoint are removed. They belong to steps that will be computed again.

        Args:
            backend_records: `backends.Choice.content`.
            tokenizer: tokenizer to write, for a new run.

        Returns:
            The metrics' log, only on rank 0, and the log of damaged samples.

        Raises:
            UserError: on every rank, if the folder cannot be written. Then its files are as they were.
        """
        step = self.records.step if self.records else 0
        opened: list[MetricsLog] = []

        def write() -> None:
            files = {
                _CONFIG: config_files.to_toml(_to_record(config)),
                backends.FILE: json.dumps(backend_records, indent=1) + "\n",
            }
            with checkpoints.explain_write_errors(self.path), replacing_files(self.path) as staging:
                for name, text in files.items():
                    (staging / name).write_text(text, encoding="utf-8")
                if tokenizer is not None:
                    tokenizer.save(staging / "tokenizer")
                opened.append(MetricsLog(self.path, step, log_config, as_json(config)))

        # A message of all ranks: they have built their parts, or this fails.
        distributed.total(0)
        try:
            run_on_rank0(write)
        except BaseException:
            # The files could not be replaced, so the log that was ready for them ends here.
            for metrics in opened:
                metrics.close()
            raise
        if opened:
            facts = {"changes": [str(change) for change in self.new_changes]} if self.new_changes else {}
            opened[0].event(step, "resume" if self.records else "start", ranks=distributed.world_size(), **facts)
        return opened[0] if opened else None, BadSamples(self.path, step, max_bad_samples)

    def save_checkpoint(self, checkpoint: checkpoints.Checkpoint, config: CheckpointConfig) -> Path:
        """Write a checkpoint with the records of the run, and remove old ones. Return its folder. Only on rank 0."""
        checkpoint = dataclasses.replace(checkpoint, run=self._saved)
        best = checkpoint.rest.get("best", {}).get("step")
        options = {"keep": config.keep, "keep_every_steps": config.keep_every_steps}
        return checkpoints.save(self.path / "checkpoints", checkpoint, best=best, **options)

    def has_model(self, checkpoint: checkpoints.Checkpoint) -> bool:
        """Whether model/, and model_ema/ of a run with an EMA, hold the weights of the checkpoint.

        A full disk or a kill after the checkpoint leaves older ones.
        """
        for name, ema in {"model": {}, "model_ema": checkpoint.ema}.items():
            if name == "model" or ema:
                try:
                    state = pretrained.load(self.path / name)[0].state_dict()
                except UserError:
                    return False
                expected = {**checkpoint.model, **ema}
                if state.keys() != expected.keys() or not all(torch.equal(state[key], expected[key]) for key in state):
                    return False
        return True

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield the path for the caller to write a model. Turn failed writes into UserErrors. Only on rank 0."""
        with checkpoints.explain_write_errors(self.path):
            yield self.path


def _command_of(table: Mapping[str, Any]) -> str | None:
    """The command whose config.toml has this content. None if it is not of a run."""
    if not {"run", "batch_size", "seed", "engine"} <= table.keys():
        return None
    return "finetune" if "lora_rank" in table else "train"


def _to_record(config: Any) -> Any:
    """The configuration as it is recorded: a permission holds for one resume."""
    return dataclasses.replace(config, allow_changes=False)


def as_json(config: Any) -> dict[str, Any]:
    """A dataclass as json would read it back, for comparison with the content of a file."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
