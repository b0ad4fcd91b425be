"""Drawn inputs of every operation: hypothesis strategies over shapes, layouts, lengths and masks.

`drawn(op, large)` is a strategy; `large` puts each dimension that a kernel cuts past one of its
tiles (at the widest ISA: 14 rows, 32 columns, 256 terms of a sum; attention's 64 queries or keys,
the losses' 112 classes), else sizes end below or a little over a vector. The strategy of an
operation is a function with `@draws` in a file of `strategies/`. Everything is decided by what
hypothesis draws, so that a derandomised run repeats itself. What no run may leave to chance, such
as each algorithm of an operation, is one of its `strata`, and `drawn` takes one.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from mbm_kernels.testing.draws import STRATA, STRATEGIES, Draws, Inputs
from mbm_kernels.testing.layouts import LAYOUTS, relayout
from mbm_kernels.testing.strategies import conv_bias_act


class Drawn:
    """Arguments of a public function by name, float32; prints as shapes, strides and options."""

    def __init__(self, op: str, given: Draws):
        self.op, self.large, self.stratum = op, given.large, given.stratum
        made = STRATEGIES[op](given).items()
        self.inputs: Inputs = {name: _lay(given, value) for name, value in made}
        self.choices = given.choices

    def redraw(self, seed: int) -> "Drawn":
        """The same shapes, layouts and options with other values."""
        choices = iter([seed, *self.choices[1:]])
        return Drawn(self.op, Draws(lambda _: next(choices), self.large, self.stratum))

    def __repr__(self) -> str:
        return ", ".join(f"{n}={_describe(v)}" for n, v in self.inputs.items())


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        dense = value.is_contiguous()
        return f"{list(value.shape)}" + ("" if dense else f" strides {list(value.stride())}")
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return f"[{'; '.join(_describe(v) for v in value)}]"
    return repr(value)


def _lay(given: Draws, value: Any) -> Any:
    """Floating tensors as float32, each tensor in a layout of its own unless it keeps one."""
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return type(value)(_lay(given, v) for v in value)
    if not isinstance(value, Tensor):
        return value
    kept = any(value is k for k in given.kept)
    if value.is_floating_point():
        value = value.float()
    if kept:
        return value
    layouts = ["dense"] * 4 + [name for name in LAYOUTS if name != "expanded" or value.dim() > 2]
    if value.dim() == 4:
        layouts += ["channels_last"] * 3
    layout = given.of(*layouts)
    if layout == "dense":
        return value
    if layout == "channels_last":
        return value.contiguous(memory_format=torch.channels_last)
    return relayout(value, layout)


def strata(op: str) -> tuple[str | None, ...]:
    """What drawn cases of `op` must hold some each of; (None,) where all are drawn alike."""
    return STRATA.get(op, (None,))


@st.composite
def drawn(draw: Callable[[Any], Any], op: str, large: bool, stratum: str | None = None) -> Drawn:
    """A strategy for the arguments of `op`, of one of its strata; None draws that too."""
    if stratum is None:
        stratum = draw(st.sampled_from(strata(op)))
    return Drawn(op, Draws(draw, large, stratum))


def each_stratum(op: str, large: bool, count: int, check: Callable[[Drawn], None]) -> None:
    """Calls `check` on `count` drawn cases or more, as many of each stratum, the same in every run.

    The first of a stratum is its simplest one, which says little: there is at least another.
    """
    strata_of = strata(op)
    wanted = max(2, -(-count // len(strata_of)))
    for number, stratum in enumerate(strata_of):
        run = given(drawn(op, large, stratum))(check)
        if stratum is not None:
            run = seed(number)(run)  # else all would draw from the same numbers
        settings(
            max_examples=wanted,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],  # what is drawn is small enough to read
            suppress_health_check=list(HealthCheck),
        )(run)()


def is_clear(op: str, inputs: Inputs) -> bool:
    """Whether no rounding decides which of two gradients is right: conv_bias_act has kinks and
    maxima, and near one of them float32 may go the other way."""
    return op != "conv_bias_act" or conv_bias_act.is_clear(**inputs)
