"""PyTorch's time over ours for what a candidate was called with, in interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mbm_kernels._core import timing
from mbm_kernels._core.ratios import LEAST_FLOOR, Ratio, paired_ratio
from mbm_kernels.nn import trial
from mbm_kernels.nn.trial import Call
from mbm_kernels.optimize import outputs
from mbm_kernels.optimize.candidates import Candidate, Forward
from mbm_kernels.optimize.report import Change

SECONDS = 0.3  # for each candidate, after warming up
WHOLE_SECONDS = 1.0
MOST_LOOPS = 16  # of one kind of call against another


def ratio(candidate: Candidate, backward: bool) -> Ratio:
    """The paired ratio of both forms over the sample's calls, each kind as often as it came.

    `backward`: with gradients of the parameters, and of the inputs that require them.
    """
    ours, stock = candidate.forms()
    fewest = min(count for _, count in candidate.calls)
    calls = [(call, min(MOST_LOOPS, round(n / fewest))) for call, n in candidate.calls]
    parameters = [p for p in candidate.parameters().values() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        forms = {
            name: _timed(form, calls, parameters, backward)
            for name, form in (("stock", stock), ("ours", ours))
        }
        times = timing.interleave(forms, SECONDS)
    return paired_ratio(times["stock"], times["ours"])


@dataclass(frozen=True)
class _Form:
    """One state of a model: `take` brings it about, outside of what is timed."""

    call: Callable[[], None]
    take: Callable[[], None]

    def __call__(self) -> None:
        self.call()

    @staticmethod
    def sampler(form: Any, loops: int) -> float:
        form.take()
        return timing.sample(form, loops)


def whole(model: nn.Module, call: Call, changes: Sequence[Change], backward: bool) -> Ratio:
    """The paired ratio of the model without and with its changes, which it is left with.

    `backward`: with gradients of the parameters.
    """
    changed = True

    def take(wanted: bool) -> None:
        nonlocal changed
        if wanted is not changed:
            for change in changes if wanted else reversed(changes):
                change.redo() if wanted else change.undo()
        changed = wanted

    run = _timed(model, [(call, 1)], [p for p in model.parameters() if p.requires_grad], backward)
    forms = {name: _Form(run, partial(take, name == "ours")) for name in ("stock", "ours")}
    with trial.unchanged(model):
        try:
            times = timing.interleave(forms, WHOLE_SECONDS, sampler=_Form.sampler)
        finally:
            take(True)
    return paired_ratio(times["stock"], times["ours"])


def wins(found: Ratio) -> bool:
    """Whether ours is faster beyond what rounds of one form differ by."""
    return found.low > 1 + LEAST_FLOOR


def _timed(
    form: Forward, calls: list[tuple[Call, int]], parameters: list[Any], backward: bool
) -> Callable[[], None]:
    given = [(*outputs.detached((call.args, call.kwargs)), loops) for call, loops in calls]

    def forward() -> None:
        with torch.no_grad():
            for args, kwargs, loops in given:
                for _ in range(loops):
                    form(*args, **kwargs)

    def both() -> None:
        with torch.enable_grad():
            for args, kwargs, loops in given:
                inputs = [t for _, t in outputs.tensors((args, kwargs)) if t.requires_grad]
                for _ in range(loops):
                    _differentiate(form(*args, **kwargs), [*parameters, *inputs])

    return both if backward else forward


def _differentiate(result: Any, leaves: list[Any]) -> None:
    found = [t for _, t in outputs.tensors(result) if t.requires_grad]
    if found and leaves:
        ones = [torch.ones_like(t) for t in found]
        torch.autograd.grad(found, leaves, ones, allow_unused=True)
