"""Where everything random of a run comes from: (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def mix_seed(seed: int, step: int) -> int:
    """A generator seed for one step of one run; steps below 0 are for set-up and epochs."""
    return (seed * 1_000_003 + step) % 2**63


@contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """Torch's generator as a step of a run has it; the state before is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(seed, step))
        yield
