"""Explicit small cases of operations, one or more for each plan that their kernels choose by shape.

What is drawn (cases.py) meets a rare plan rarely; these meet every one each time. `make sanitize`
replays them, and measures that hardly a line of csrc is left out.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
STRATA: dict[str, Callable[["Numbers"], Iterator[tuple[str, Inputs]]]] = {}


class Numbers:
    """Seeded float32 values."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale


def strata(
    make: Callable[[Numbers], Iterator[tuple[str, Inputs]]],
) -> Callable[[Numbers], Iterator[tuple[str, Inputs]]]:
    """Registers the strata of the operation of the same name."""
    STRATA[make.__name__] = make
    return make


def of(op: str) -> list[tuple[str, Inputs]]:
    """What each is there for, and the public function's arguments."""
    return list(STRATA[op](Numbers())) if op in STRATA else []


def _image(numbers: Numbers, b: int, c: int, y: int, x: int, last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return numbers(b, c, y, x).contiguous(memory_format=layout)


@strata
def conv_bias_act(numbers: Numbers) -> Iterator[tuple[str, Inputs]]:
    """By kernel size, stride, groups and channels, in both layouts."""
    plans: list[tuple[str, tuple[int, int, int, int, int, int], dict[str, Any]]] = [
        ("1x1", (2, 32, 48, 9, 11, 1), {}),
        ("1x1, few pixels", (1, 40, 33, 3, 2, 1), {"activation": "silu"}),
        ("1x1, stride 2", (2, 24, 40, 9, 8, 1), {"stride": 2}),
        ("1x1, groups", (2, 24, 40, 6, 7, 1), {"groups": 2}),
        ("1x1, pool", (2, 24, 40, 8, 8, 1), {"max_pool": 2, "activation": "relu"}),
        ("Winograd", (2, 32, 40, 14, 13, 3), {"padding": 1, "activation": "relu"}),
        ("Winograd, pool", (2, 24, 24, 14, 15, 3), {"padding": 1, "max_pool": 2}),
        ("Winograd, no padding", (3, 16, 17, 9, 8, 3), {"activation": "gelu"}),
        ("Winograd, wide", (1, 72, 80, 30, 30, 3), {"padding": 1}),
        ("Winograd, many tiles", (4, 16, 32, 40, 40, 3), {"padding": 1}),
        ("stem", (1, 3, 32, 24, 33, 3), {"padding": 1, "max_pool": 2, "activation": "relu"}),
        ("stem of 7x7", (1, 3, 24, 33, 34, 7), {"padding": 3, "stride": 2, "max_pool": (3, 2, 1)}),
        ("depthwise", (2, 40, 40, 12, 13, 3), {"groups": 40, "padding": 1, "activation": "relu"}),
        ("depthwise 7x7", (1, 33, 33, 14, 13, 7), {"groups": 33, "padding": 3}),
        ("depthwise 5x5", (1, 40, 40, 12, 13, 5), {"groups": 40, "padding": 2}),
        ("depthwise 5x5, stride 2", (1, 40, 40, 13, 12, 5), {"groups": 40, "stride": 2}),
        ("depthwise 7x7, stride 2", (1, 40, 40, 15, 16, 7), {"groups": 40, "stride": 2}),
        ("depthwise 4x4", (1, 24, 24, 9, 10, 4), {"groups": 24, "padding": 1}),
        ("depthwise 5x5, dilation", (1, 24, 24, 13, 14, 5), {"groups": 24, "dilation": 2}),
        ("depthwise, stride 2", (2, 24, 24, 13, 14, 3), {"groups": 24, "padding": 1, "stride": 2}),
        ("depthwise, two outputs", (1, 24, 48, 9, 9, 3), {"groups": 24, "padding": 1}),
        ("stride 2", (2, 24, 40, 13, 12, 3), {"stride": 2, "padding": 1, "activation": "relu"}),
        ("dilation", (1, 20, 33, 14, 13, 3), {"dilation": 2, "padding": 2}),
        ("5x5", (1, 24, 40, 12, 13, 5), {"padding": 2, "activation": "tanh"}),
        ("groups", (2, 24, 48, 10, 9, 3), {"groups": 3, "padding": 1}),
    ]
    for what, (b, c, k, y, x, kernel), options in plans:
        for last in (False, True):
            weight = _image(numbers, k, c // options.get("groups", 1), kernel, kernel, last)
            layout = "channels_last" if last else "NCHW"
            inputs = {"x": _image(numbers, b, c, y, x, last), "weight": 0.1 * weight, **options}
            yield f"{what}, {layout}", {**inputs, "bias": numbers(k)}
    outputs_last = numbers(24, 3, 3, 40, scale=0.1).permute(3, 0, 1, 2)
    yield "Winograd, weight with outputs last", {"x": numbers(1, 24, 9, 9), "weight": outputs_last}
    pooled = {"padding": 1, "max_pool": 2, "activation": "relu"}
    for channels in (8, 32):
        spoilt = numbers(1, 3, 12, 14)
        spoilt[0, 1, 4, 5] = torch.nan
        weight = numbers(channels, 3, 3, 3, scale=0.1)
        yield f"stem with a NaN, {channels} outputs", {"x": spoilt, "weight": weight, **pooled}
