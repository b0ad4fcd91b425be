"""Fixed small cases, whose kernels' instructions `make gate` counts: under 20 million each.

A case is (operation, what it is, its arguments by name). Numbers are drawn from one seed, so that
a case decides every branch the same way in each run.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


class _Numbers:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def below(self, most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=self.generator)


def _gru(numbers: _Numbers, t: int, b: int, c: int, h: int, **more: Any) -> Inputs:
    return {
        "x": numbers(t, b, c),
        "h0": numbers(b, h),
        "w_ih": numbers(3 * h, c, scale=c**-0.5),
        "w_hh": numbers(3 * h, h, scale=h**-0.5),
        "b_ih": numbers(3 * h),
        "b_hh": numbers(3 * h),
        **more,
    }


def _conv(
    numbers: _Numbers, b: int, c: int, k: int, side: int, kernel: int, **options: Any
) -> Inputs:
    x = numbers(b, c, side, side).contiguous(memory_format=torch.channels_last)
    weight = numbers(k, c // options.get("groups", 1), kernel, kernel, scale=0.1)
    return {"x": x, "weight": weight, "bias": numbers(k), **options}


def cases() -> Iterator[tuple[str, str, Inputs]]:
    yield from _recurrent()
    yield from _convolutions()
    yield from _attention()
    yield from _linear()


def _recurrent() -> Iterator[tuple[str, str, Inputs]]:
    numbers = _Numbers()
    yield "gru", "one row", _gru(numbers, 12, 1, 64, 96)
    lengths = torch.tensor([6, 1, 3, 0, 6, 2, 5, 4, 6, 1, 3, 5, 6, 2, 4, 6])
    yield "gru", "16 rows of some length", _gru(numbers, 6, 16, 64, 48, lengths=lengths)
    cell = _gru(numbers, 1, 4, 96, 128)
    yield "gru_cell", "4 rows", {**cell, "x": cell["x"][0], "h": cell["h0"], "h0": None}
    both, other = _gru(numbers, 6, 3, 64, 48), _gru(numbers, 6, 3, 64, 48)
    states = torch.stack([both.pop("h0"), other.pop("h0")])
    reverse = {f"{name}_reverse": value for name, value in other.items() if name != "x"}
    yield "gru_bidirectional", "3 rows", {**both, "h0": states, **reverse}


def _convolutions() -> Iterator[tuple[str, str, Inputs]]:
    numbers = _Numbers()
    same = {"padding": 1, "activation": "relu"}
    for what, inputs in {
        "winograd": _conv(numbers, 2, 32, 32, 14, 3, **same),
        "winograd and pool": _conv(numbers, 2, 32, 32, 14, 3, max_pool=2, **same),
        "stem": _conv(numbers, 1, 3, 32, 32, 3, max_pool=2, **same),
        "stride 2": _conv(numbers, 1, 32, 48, 15, 3, stride=2, **same),
        "one by one": _conv(numbers, 2, 64, 64, 12, 1, activation="silu"),
        "depthwise": _conv(numbers, 2, 64, 64, 16, 3, groups=64, **same),
        "grouped": _conv(numbers, 2, 64, 64, 14, 3, groups=8, **same),
    }.items():
        yield "conv_bias_act", what, inputs


def _attention() -> Iterator[tuple[str, str, Inputs]]:
    numbers = _Numbers()
    lengths = torch.tensor([49, 20])
    for what, steps in (("6 queries", 6), ("one query", 1)):
        inputs = {
            "query": numbers(2, steps, 128),
            "key": numbers(2, 49, 128),
            "value": numbers(2, 49, 64),
            "v": numbers(128, scale=0.1),
        }
        yield "additive_attention", what, inputs
        yield "additive_attention", f"{what}, lengths", {**inputs, "key_lengths": lengths}
    long_v = {"query": numbers(2, 6, 128), "v": numbers(128)}
    yield "additive_attention", "6 queries, long v", {**inputs, **long_v}
    step = {
        "query": numbers(2, 1, 128),
        "key": numbers(2, 130, 128),
        "value": numbers(2, 130, 64),
        "v": numbers(128, scale=0.1),
    }
    yield "additive_attention", "one query, 130 positions", step
    inputs = {
        "query": numbers(2, 4, 20, 32),
        "key": numbers(2, 4, 98, 32),
        "value": numbers(2, 4, 98, 32),
    }
    for what, more in {
        "context": {},
        "mean weights": {"need_weights": "mean"},
        "lengths": {"key_lengths": 2 * lengths},
        "mask": {"mask": numbers(2, 1, 20, 98) > -1},
    }.items():
        yield "cross_attention", what, {**inputs, **more}


def _linear() -> Iterator[tuple[str, str, Inputs]]:
    numbers = _Numbers()
    yield (
        "concat_linear",
        "shared vector",
        {
            "inputs": [numbers(4, 12, 128), numbers(4, 1, 128)],
            "weight": numbers(96, 256, scale=0.1),
            "bias": numbers(96),
        },
    )
    target = numbers.below(500, 48)
    target[::3] = -100
    hidden, weight = numbers(48, 64), numbers(500, 64, scale=0.1)
    yield (
        "linear_cross_entropy",
        "a third ignored",
        {"hidden": hidden, "weight": weight, "target": target, "bias": numbers(500)},
    )
    head = {"hidden": hidden, "weight": weight, "bias": numbers(500)}
    for k in (1, 5):
        yield "linear_topk", f"{k} of 500", {**head, "k": k}
    student = {"student_hidden": hidden, "student_weight": weight, "target": target}
    teacher = {"teacher_hidden": numbers(48, 96), "teacher_weight": numbers(500, 96, scale=0.1)}
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        inputs = {**student, **teacher, "divergence": divergence, "temperature": 2.0}
        yield "linear_distillation_loss", divergence, inputs
    pair = {"image": numbers(48, 64, scale=0.3), "text": numbers(48, 64, scale=0.3)}
    scale = torch.tensor(1.3)
    yield "contrastive_loss", "infonce", {**pair, "scale": scale}
    bias = torch.tensor(-1.7)
    yield "contrastive_loss", "siglip", {**pair, "scale": scale, "bias": bias, "kind": "siglip"}
