"""Every operation and module as torch's tools meet it: small inputs, and the batch in each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels.ops import linear_topk


@dataclass(frozen=True)
class Case:
    """A function or module, and what it is called with.

    make: of a backend, what is called. inputs: of a batch's size, the tensors, of which the last
    are given by `names`. batch: its axis in each of them, None where it has none. options: others.
    """

    make: Callable[[str], Callable[..., Any]]
    inputs: Callable[[int], tuple[Tensor, ...]]
    batch: tuple[int | None, ...]
    names: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def dynamic(self, size: Any) -> tuple[tuple[dict[int, Any], ...]]:
        """What is dynamic of a Model's inputs, as torch.export takes it."""
        return (tuple({} if axis is None else {axis: size} for axis in self.batch),)


class Model(torch.nn.Module):
    """A model that calls a case's function or module."""

    def __init__(self, case: Case, backend: str):
        super().__init__()
        self.case, self.callee = case, case.make(backend)

    def forward(self, *tensors: Tensor) -> Any:
        split = len(tensors) - len(self.case.names)
        named = dict(zip(self.case.names, tensors[split:], strict=True))
        return self.callee(*tensors[:split], **named, **self.case.options)


def _function(function: Callable[..., Any]) -> Callable[[str], Callable[..., Any]]:
    return lambda backend: partial(function, backend=backend)


def _concat_linear(
    first: Tensor, second: Tensor, weight: Tensor, bias: Tensor, backend: str
) -> Tensor:
    return mbm_kernels.concat_linear([first, second], weight, bias, backend=backend)


def _r(*sizes: int) -> Tensor:
    return torch.randn(sizes)


def _classes(batch: int) -> Tensor:
    return torch.arange(batch) % 11


def _gru_weights() -> tuple[Tensor, ...]:
    return _r(12, 3), _r(12, 4), _r(12), _r(12)


FUNCTIONS = {
    "conv_bias_act": Case(
        _function(mbm_kernels.conv_bias_act),
        lambda b: (_r(b, 3, 6, 6), _r(4, 3, 3, 3), _r(4), _r(b, 4, 6, 6)),
        (0, None, None, 0),
        ("residual",),
        {"padding": 1, "activation": "relu", "max_pool": 2},
    ),
    "gru": Case(
        _function(mbm_kernels.gru),
        lambda b: (_r(5, b, 3), _r(b, 4), *_gru_weights()),
        (1, 0, None, None, None, None),
    ),
    "gru of lengths": Case(
        _function(mbm_kernels.gru),
        lambda b: (_r(5, b, 3), _r(b, 4), *_gru_weights(), torch.arange(b) % 6),
        (1, 0, None, None, None, None, 0),
        ("lengths",),
        {"reverse": True},
    ),
    "gru_cell": Case(
        _function(mbm_kernels.gru_cell),
        lambda b: (_r(b, 3), _r(b, 4), *_gru_weights()),
        (0, 0, None, None, None, None),
    ),
    "additive_attention": Case(
        _function(mbm_kernels.additive_attention),
        lambda b: (_r(b, 2, 6), _r(b, 5, 6), _r(b, 5, 7), _r(6), torch.arange(b) % 6),
        (0, 0, 0, None, 0),
        ("key_lengths",),
    ),
    "cross_attention": Case(
        _function(mbm_kernels.cross_attention),
        lambda b: (_r(b, 2, 3, 4), _r(b, 2, 5, 4), _r(b, 2, 5, 6), _r(b, 1, 3, 5) > -1),
        (0, 0, 0, 0),
        ("mask",),
        {"need_weights": "mean"},
    ),
    "concat_linear": Case(
        _function(_concat_linear),
        lambda b: (_r(b, 1, 3), _r(b, 4, 2), _r(6, 5), _r(6)),
        (0, 0, None, None),
    ),
    "linear_cross_entropy": Case(
        _function(mbm_kernels.linear_cross_entropy),
        lambda b: (_r(b, 8), _r(11, 8), _classes(b), _r(11)),
        (0, None, 0, None),
        ("bias",),
        {"label_smoothing": 0.1, "z_loss": 1e-2},
    ),
    "linear_distillation_loss": Case(
        _function(mbm_kernels.linear_distillation_loss),
        lambda b: (_r(b, 8), _r(11, 8), _classes(b), _r(b, 6), _r(11, 6)),
        (0, None, 0, 0, None),
        ("teacher_hidden", "teacher_weight"),
        {"temperature": 2.0},
    ),
    "contrastive_loss": Case(
        _function(mbm_kernels.contrastive_loss),
        lambda b: (_r(b, 8), _r(b, 8), _r().exp()),
        (0, 0, None),
    ),
    "linear_topk": Case(
        _function(linear_topk),
        lambda b: (_r(b, 8), _r(11, 8), _r(11)),
        (0, None, None),
        options={"k": 3},
    ),
}

MODULES = {
    "Conv2d": Case(
        lambda backend: nn.Conv2d(3, 4, 3, padding=1, backend=backend),
        lambda b: (_r(b, 3, 6, 6),),
        (0,),
    ),
    "ConvBiasAct": Case(
        lambda backend: nn.ConvBiasAct(3, 4, 3, activation="silu", max_pool=2, backend=backend),
        lambda b: (_r(b, 3, 8, 8), _r(b, 4, 6, 6)),
        (0, 0),
    ),
    "GRU": Case(
        lambda backend: nn.GRU(3, 4, num_layers=2, bidirectional=True, backend=backend),
        lambda b: (_r(5, b, 3), _r(4, b, 4)),
        (1, 1),
    ),
    "GRUCell": Case(
        lambda backend: nn.GRUCell(3, 4, backend=backend),
        lambda b: (_r(b, 3), _r(b, 4)),
        (0, 0),
    ),
    "MultiheadAttention": Case(
        lambda backend: nn.MultiheadAttention(8, 2, batch_first=True, backend=backend),
        lambda b: (_r(b, 3, 8), _r(b, 5, 8), _r(b, 5, 8)),
        (0, 0, 0),
    ),
    "AdditiveAttention": Case(
        lambda backend: nn.AdditiveAttention(3, 4, 5, backend=backend),
        lambda b: (_r(b, 2, 3), _r(b, 6, 4)),
        (0, 0),
    ),
    "ConcatLinear": Case(
        lambda backend: nn.ConcatLinear((3, 2), 6, backend=backend),
        lambda b: (_r(b, 1, 3), _r(b, 4, 2)),
        (0, 0),
    ),
    "LinearDistillationLoss": Case(
        lambda backend: nn.LinearDistillationLoss(temperature=2.0, backend=backend),
        lambda b: (_r(b, 8), _r(11, 8), _classes(b), _r(b, 6), _r(11, 6)),
        (0, None, 0, 0, None),
        ("teacher_hidden", "teacher_weight"),
    ),
}
ALL = FUNCTIONS | MODULES


def flat(results: Any) -> list[Tensor]:
    """The tensors among a function's results."""
    results = results if isinstance(results, (tuple, list)) else (results,)
    return [r for r in results if isinstance(r, Tensor)]


def assert_same(actual: Any, expected: Any, **tolerances: float) -> None:
    for a, e in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(a, e, **tolerances)


each_case = pytest.mark.parametrize("name", ALL)
each_backend = pytest.mark.parametrize("backend", ["cpu", "torch"])
