"""Errors of what we run and of stock PyTorch, both against the same in float64.

The rule is the library's (`mbm_kernels.testing.errors`): at most twice PyTorch's error, three times
for gradients, plus a floor of 4 eps of the largest value. What a whole model's sums are of is not
known, so that the floor of a gradient goes by the largest of all gradients; and where convolutions
run, Winograd's constant is added.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mbm_kernels._core import dispatch, torch_private
from mbm_kernels._core.accuracy import (
    FLOOR_EPS,
    FORWARD_FACTOR,
    GRADIENT_FACTOR,
    Budget,
    max_abs,
)
from mbm_kernels.optimize import outputs

Values = dict[str, Tensor]


@dataclass(frozen=True)
class ParityRow:
    """One output or gradient: errors in the max-abs norm, and what ours may be."""

    what: str
    error: float
    stock_error: float
    limit: float
    largest: float  # |value| in float64

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Parity:
    """What `check_parity` found; as text it is a table, largest error by its limit first."""

    rows: list[ParityRow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every output and gradient is within its limit."""
        return all(row.ok for row in self.rows)

    @property
    def error(self) -> float:
        """The largest error of an output, over that output's largest value."""
        outputs = (r for r in self.rows if _is_output(r.what) and r.largest > 0)
        return max((r.error / r.largest for r in outputs), default=0.0)

    def to_json(self) -> str:
        """The same as JSON text."""
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        return json.dumps({"ok": self.ok, "error": self.error, "rows": rows}, indent=2)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("what", "error", "PyTorch's", "limit", "")
        ordered = sorted(self.rows, key=lambda r: r.error / max(r.limit, 1e-300), reverse=True)
        for r in ordered:
            numbers = (f"{x:.1e}" for x in (r.error, r.stock_error, r.limit))
            table.add_row(Text(r.what), *numbers, "" if r.ok else "over")
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


def compare(ours: Values, stock: Values, truth: Values, winograd: bool) -> Parity:
    """The errors of results in one dtype against float64; gradients are named so."""
    extra = 0.0
    if winograd:
        from mbm_kernels.ops.conv_bias_act.backend_cpu import WINOGRAD_ERROR as extra
    steepest = max((max_abs(t) for w, t in truth.items() if not _is_output(w)), default=0.0)
    rows = []
    for what, exact in truth.items():
        theirs = stock[what]
        mine = ours.get(what, torch.zeros_like(theirs))
        largest = max_abs(exact)
        scale = largest if _is_output(what) else steepest
        budget = Budget(
            FORWARD_FACTOR if _is_output(what) else GRADIENT_FACTOR,
            max_abs(theirs.double() - exact),
            (FLOOR_EPS * torch.finfo(theirs.dtype).eps + extra) * scale,
        )
        error = max_abs(mine.double() - exact)
        if not torch.equal(torch.isfinite(mine), torch.isfinite(theirs)):
            error = float("inf")
        rows.append(ParityRow(what, error, budget.yardstick, budget.limit, largest))
    return Parity(rows)


def _is_output(what: str) -> bool:
    return what.startswith("output")


def without_dropout(model: nn.Module) -> nn.Module:
    """The model, in place, with no dropout in any module of torch."""
    for module in model.modules():
        if isinstance(module, torch_private.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            vars(module)["dropout"] = 0.0
    return model


def values(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    backward: bool,
    disabled: bool = False,
) -> Values:
    """Outputs without gradients and, if asked for, the gradients of parameters and inputs.

    `disabled`: by PyTorch alone.
    """
    with dispatch.disabled() if disabled else nullcontext(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.no_grad():
            found = named_outputs(call(*args, **kwargs))
        if backward:
            torch.manual_seed(0)
            found |= _gradients(call, args, kwargs, parameters)
    return found


def named_outputs(result: Any) -> Values:
    """The floating tensors of a result."""
    return {f"output{path}": t.detach() for path, t in outputs.tensors(result)}


def _gradients(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    parameters: dict[str, nn.Parameter],
) -> Values:
    leaves: Values = {f"gradient of {n}": p for n, p in parameters.items() if p.requires_grad}
    given = outputs.tensors((args, kwargs), "input")
    leaves |= {f"gradient of {path}": t for path, t in given if t.requires_grad}
    with torch.enable_grad():
        found = [t for _, t in outputs.tensors(call(*args, **kwargs)) if t.requires_grad]
        if not found or not leaves:
            return {}
        weights = [_cotangent(t, seed) for seed, t in enumerate(found)]
        grads = torch.autograd.grad(found, list(leaves.values()), weights, allow_unused=True)
    return {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def _cotangent(like: Tensor, seed: int) -> Tensor:
    """The same numbers for each dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
