"""Training runs in separate processes, which tests signal, kill and resume."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ranks import fork_server
from synthetic import tiny_model

from bclip_fast import distributed
from bclip_fast.errors import UserError
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.trainer import train

DROPOUT = tiny_model(dropout=0.1)


def train_rank(config: TrainConfig, rank: int, num_ranks: int, port: int, pause: float, stop_at: int) -> None:
    torch.set_num_threads(1)
    distributed._GRACE_S = 1.0
    logging.basicConfig(level=logging.WARNING, filename=f"{config.run}.{rank}.log")
    if num_ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def on_step(record: dict[str, Any]) -> None:
        time.sleep(pause)
        if record["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(config, on_step=on_step)
    except UserError as error:
        logging.getLogger().error("%s", error)
        raise SystemExit(2) from None


@contextlib.contextmanager
def running(config: TrainConfig, num_ranks: int = 1, pause: float = 0.0, stop_at: int = 0) -> Iterator[list[Any]]:
    """Start the ranks of a run, and end them with the context.

    Args:
        pause: seconds that rank 0 sleeps after each step.
        stop_at: step after which rank 0 sends itself SIGTERM. 0 sends none.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path(config.run).parent.mkdir(parents=True, exist_ok=True)
    ranks = [
        fork_server().Process(target=train_rank, args=(config, rank, num_ranks, port, pause, stop_at))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        yield ranks
        for process in ranks:
            process.join(60)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return result


def changed_since(path: Path, moment: float) -> bool:
    return path.is_file() and path.stat().st_mtime > moment


def num_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def log_of(run: Path, rank: int = 0) -> str:
    return Path(f"{run}.{rank}.log").read_text()
