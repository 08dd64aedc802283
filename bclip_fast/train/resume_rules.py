"""Rules for the settings that a resumed run may change. Every field of the configurations has one, by its dotted name.

The rule of a section holds for its fields without a rule. A test walks all fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bclip_fast import config as config_files
from bclip_fast.errors import UserError


class Rule(Enum):
    """The effect of a changed field on a resumed run."""

    FREE = "nothing: logs, workers, time limits, places of output, intervals of checkpoints and validation"
    LISTED = "nothing but rounding errors or the length of the run; the log and the records list it"
    ARITHMETIC = "the run continues as another one; needs --allow_changes"
    FIXED = "the state of the run doesn't fit any more; never allowed"


FREE, LISTED, ARITHMETIC, FIXED = Rule

_COMMON = {
    "run": FREE,
    "resume": FREE,
    "allow_changes": FREE,
    "seed": FIXED,
    # The learning rate follows the new length.
    "epochs": LISTED,
    "batch_size": FIXED,
    # The checkpoint has the state of this optimiser.
    "optim.name": FIXED,
    "optim.lr": ARITHMETIC,
    "optim.min_lr": ARITHMETIC,
    "optim.warmup_steps": ARITHMETIC,
    "optim.beta1": ARITHMETIC,
    "optim.beta2": ARITHMETIC,
    "optim.eps": ARITHMETIC,
    "optim.weight_decay": ARITHMETIC,
    "optim.layer_decay": ARITHMETIC,
    "optim.decay": ARITHMETIC,
    "optim.batch_lr": ARITHMETIC,
    "optim.grad_clip_norm": ARITHMETIC,
    "optim.muon_lr": ARITHMETIC,
    "optim.muon_weight_decay": ARITHMETIC,
    "optim.muon_momentum": ARITHMETIC,
    # Every engine and ZeRO stage reads every checkpoint. They only sum in other orders.
    "engine.name": LISTED,
    "engine.zero_stage": LISTED,
    "engine.precision": ARITHMETIC,
    "engine.grad_checkpointing": LISTED,
    "engine.offload_activations": LISTED,
    "engine.offload_optimizer": LISTED,
    "engine.cpu_adam": ARITHMETIC,
    "engine.offload_parameters": LISTED,
    "engine.compile": ARITHMETIC,
    "engine.cuda_graphs": LISTED,
    "engine.bucket_mib": LISTED,
    "loss.kind": ARITHMETIC,
    "loss.label_smoothing": ARITHMETIC,
    "loss.hardness": ARITHMETIC,
    # The content of the teacher is compared, too.
    "loss.teacher": LISTED,
    "loss.teacher_cache": ARITHMETIC,
    "loss.distill_weight": ARITHMETIC,
    "loss.caption_loss_weight": ARITHMETIC,
    "loss.clip_loss_weight": ARITHMETIC,
    "spikes.window": ARITHMETIC,
    "spikes.loss": ARITHMETIC,
    "spikes.grad_norm": ARITHMETIC,
    "spikes.max_skipped": LISTED,
}

RULES: dict[str, dict[str, Rule]] = {
    "train": {
        **_COMMON,
        "dry_run": FREE,
        "max_steps": LISTED,
        "batch_schedule": FIXED,
        # Other micro-batches have other dropout masks and batch norms.
        "micro_batch_size": ARITHMETIC,
        "micro_batch_tokens": ARITHMETIC,
        "ema_decay": ARITHMETIC,
        "patch_dropout_until": ARITHMETIC,
        "timeout_s": FREE,
        "lock_image": ARITHMETIC,
        "lock_image_unlocked_groups": ARITHMETIC,
        "lock_text": ARITHMETIC,
        "lock_text_unlocked_layers": ARITHMETIC,
        # Written out in the section `model`.
        "preset": FREE,
        "model": FIXED,
        "init": FIXED,
        # The fingerprint of the data is compared, too.
        "data.shards": LISTED,
        "data.split": FIXED,
        "data.filter": FIXED,
        "data.positives": ARITHMETIC,
        "data.captions": ARITHMETIC,
        "data.long_texts": ARITHMETIC,
        "data.tokenizer": FIXED,
        "data.shuffle_block": FIXED,
        "data.augment": ARITHMETIC,
        "data.crop_scale": ARITHMETIC,
        "data.loader": ARITHMETIC,
        "data.num_threads": FREE,
        "data.prefetch_batches": FREE,
        "data.spool_above_mib": FREE,
        "data.spool_dir": FREE,
        "data.max_bad_samples": LISTED,
        "data.timeout_s": FREE,
        "data.read": FREE,
        # Written out in the section `model`.
        "loss.init_scale": FREE,
        "loss.init_bias": FREE,
        "validation.every_steps": FREE,
        "validation.every_epochs": FREE,
        "validation.split": LISTED,
        "validation.batch_size": FREE,
        "validation.zero_shot": LISTED,
        "validation.zero_shot_data": LISTED,
        "checkpoint.every_steps": FREE,
        "checkpoint.keep": FREE,
        "checkpoint.keep_every_steps": FREE,
        "checkpoint.best": LISTED,
        "checkpoint.background": FREE,
        "log": FREE,
        "cluster": FREE,
    },
    "finetune": {
        **_COMMON,
        # The content of model and data is compared, too.
        "model": LISTED,
        "data": LISTED,
        "split": FIXED,
        "filter": FIXED,
        "task": FIXED,
        "label": FIXED,
        "multi_label": FIXED,
        # The splits follow the groups.
        "group": FIXED,
        "class_weights": ARITHMETIC,
        # Only the start of a run reads them.
        "prompts": FIXED,
        # The best value so far is of this metric.
        "metric": FIXED,
        "patience": LISTED,
        "positives": ARITHMETIC,
        # Only the start of a run reads them.
        "loss.init_scale": FIXED,
        "loss.init_bias": FIXED,
        "lora_rank": FIXED,
        "lora_alpha": ARITHMETIC,
        "freeze_towers": ARITHMETIC,
        "head_layers": FIXED,
        "crop_scale": ARITHMETIC,
        "num_workers": FREE,
        "on_bad_image": LISTED,
        "checkpoint_every": FREE,
    },
}


@dataclass(frozen=True)
class Change:
    """A setting or a library that differs from the record of the run. None: it has no value."""

    name: str
    recorded: Any
    asked: Any
    rule: Rule = Rule.LISTED

    def __str__(self) -> str:
        return f"{self.name}: {_text(self.recorded)} -> {_text(self.asked)}"

    def as_json(self) -> dict[str, Any]:
        """The change for the records of the run."""
        return {"name": self.name, "recorded": self.recorded, "asked": self.asked}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Change:
        """The inverse of `as_json`."""
        return cls(record["name"], record.get("recorded"), record.get("asked"))


def rule_of(command: str, name: str) -> Rule:
    """The rule of a field. Raises KeyError for a field without a rule."""
    rules, part = RULES[command], name
    while part not in rules:
        part, dot, _ = part.rpartition(".")
        if not dot:
            raise KeyError(f"{name} has no rule in resume_rules.py")
    return rules[part]


def flat(config: Any) -> dict[str, Any]:
    """The fields of a configuration, or the values of its file, by dotted name. None is left out."""
    return dict(_flat(config if isinstance(config, Mapping) else config_files.plain(config), ""))


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changed_settings(command: str, recorded: Mapping[str, Any], config: Any) -> list[Change]:
    """The fields of `config` that differ from the record of the run, without those that are free.

    An earlier version had not all of today's fields. They count as recorded with their defaults.

    Args:
        recorded: `flat` of the recorded configuration.
    """
    asked, defaults = flat(config), flat(_defaults(type(config)))
    changes = []
    for name in dict.fromkeys([*asked, *recorded]):
        before, after = recorded.get(name, defaults.get(name)), asked.get(name)
        if before != after and (rule := _rule_or_listed(command, name)) is not FREE:
            changes.append(Change(name, before, after, rule))
    return changes


def _rule_or_listed(command: str, name: str) -> Rule:
    """The rule of a field. LISTED for a field of another version."""
    try:
        return rule_of(command, name)
    except KeyError:
        return LISTED


def changed_environment(recorded: Mapping[str, str], current: Mapping[str, str]) -> list[Change]:
    """The libraries, devices and numbers of ranks that differ. Without a record, nothing differs."""
    names = [name for name in {**recorded, **current} if recorded.get(name) != current.get(name)] if recorded else []
    return [Change(name, recorded.get(name), current.get(name), LISTED) for name in names]


def check(run: str, changes: list[Change], allowed: bool) -> None:
    """Check that a run may be resumed with these changes.

    Raises:
        UserError: a field is fixed, or it changes the arithmetic and `allowed` is false.
    """
    if fixed := [change for change in changes if change.rule is FIXED]:
        name = fixed[0].name
        raise UserError(
            f"cannot resume {run} with another {name}: the checkpoint has {name} {_text(fixed[0].recorded)}, this run "
            f"has {_text(fixed[0].asked)}; restore it, or choose another run folder"
        )
    refused = [change for change in changes if change.rule is ARITHMETIC]
    if refused and not allowed:
        raise UserError(
            f"cannot resume {run} with settings that change its arithmetic: {', '.join(map(str, refused))}; restore "
            "them, or add --allow_changes"
        )


def _defaults(cls: type) -> dict[str, Any]:
    defaults = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    plain: dict[str, Any] = config_files.plain(defaults)
    return plain


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={item}" for name, item in value.items() if item != "")
    return ", ".join(map(_text, value)) or "empty" if isinstance(value, list | tuple) else str(value) or "empty"
