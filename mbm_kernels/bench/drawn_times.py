"""Times of drawn problems by the kernel and by PyTorch, in the same rounds."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mbm_kernels._core import dispatch, timing
from mbm_kernels.bench import drawn

SECONDS_EACH = 0.06
MIN_ROUNDS, MAX_ROUNDS = 5, 12
QUANTILE = 0.25  # what else runs makes a sample slower, never faster


@dataclass(frozen=True)
class Timed:
    """One problem: the sizes that `auto` goes by, and nanoseconds of a call by each backend.

    again_ns: PyTorch's once more, as a form of its own; None where that was not asked for.
    """

    op: str
    label: str
    training: bool
    threads: int
    sizes: dict[str, int]
    cpu_ns: float
    torch_ns: float
    again_ns: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sizes_of(op: str, call: Callable[[], object]) -> dict[str, int]:
    """The sizes by which one call of `op` chooses its backend."""
    with dispatch.observed() as seen:
        call()
    return next(choice.sizes for choice in seen if choice.op == op)


def measure(problem: drawn.Drawn, *, twice: bool = False) -> Timed:
    """Times one problem with the present number of threads."""
    of = problem.call()
    forms = {"cpu": of("cpu"), "torch": of("torch")}
    sizes = sizes_of(problem.op, forms["cpu"])
    if twice:
        forms["again"] = of("torch")
    times = timing.interleave(forms, SECONDS_EACH, min_rounds=MIN_ROUNDS, max_rounds=MAX_ROUNDS)
    low = {name: round(float(np.quantile(t, QUANTILE))) for name, t in times.items()}
    return Timed(
        problem.op,
        problem.label,
        problem.training,
        torch.get_num_threads(),
        sizes,
        low["cpu"],
        low["torch"],
        low.get("again"),
    )


def measured(
    op: str,
    *,
    seed: int,
    seconds: float = float("inf"),
    most: int | None = None,
    twice: bool = False,
) -> Iterator[Timed]:
    """Problems of `op` in turn by inference and training, by all threads and one."""
    rng, end = random.Random(f"{op} {seed}"), time.monotonic() + seconds
    all_threads, count = torch.get_num_threads(), 0
    while time.monotonic() < end and (most is None or count < most):
        problem = drawn.draw(op, rng, count % 2 == 1)
        with timing.threads(1 if count % 4 > 1 else all_threads):
            yield measure(problem, twice=twice)
        count += 1
