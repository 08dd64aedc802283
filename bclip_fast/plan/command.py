"""`bclip plan`, and `bclip train`, which plans when its configuration says `dry_run`."""

from __future__ import annotations

from pathlib import Path

from bclip_fast.hardware import cluster_of
from bclip_fast.train import trainer
from bclip_fast.train.config import TrainConfig

from . import estimate as estimates


def run(config: TrainConfig) -> estimates.Plan:
    """Print the plan of a run.

    Raises:
        UserError: a batch that the ranks cannot share, or a run that does not fit into the memory of the cluster.
    """
    config = config.resolved()
    plan = estimates.make(config, estimates.samples_of(config), cluster_of(config.cluster))
    estimates.show(config, plan)
    estimates.refuse(config, plan)
    return plan


def train(config: TrainConfig) -> Path:
    """Train to the end, or print the plan under `dry_run`. Returns the run folder, which a plan does not create."""
    if config.dry_run:
        run(config)
        return Path(config.run)
    return trainer.train(config)
