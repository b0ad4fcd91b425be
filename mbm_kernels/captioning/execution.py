"""Where a training runs, which changes nothing but rounding in what it gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """Device, form of parallelism, and what is written beside checkpoints.

    device: "cpu" or "cuda". parallel: "ddp" or "fsdp2", where torch.distributed has several
    processes. tensorboard: write losses to ``tensorboard/`` in the run's folder.
    """

    device: str = "cpu"
    parallel: str = "ddp"
    tensorboard: bool = False


HERE = Execution()
