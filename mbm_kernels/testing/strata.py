"""Explicit small cases of operations, one or more for each plan that their kernels choose by shape.

What is drawn (cases.py) meets a rare plan rarely; these meet every one each time. `make sanitize`
replays them, and measures that hardly a line of csrc is left out.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS

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


@strata
def contrastive_loss(numbers: Numbers) -> Iterator[tuple[str, Inputs]]:
    """Both losses, with a scale of either sign, and rows that take several chunks."""
    for kind in ("infonce", "siglip"):
        for scale in (1.3, -0.7):
            yield (
                f"{kind}, scale {scale}",
                {
                    "image": numbers(37, 21),
                    "text": numbers(37, 21),
                    "scale": torch.tensor(scale),
                    "bias": torch.tensor(-1.7) if kind == "siglip" else None,
                    "kind": kind,
                },
            )
    # The largest logits come last.
    growing = numbers(1600, 2) * torch.linspace(0.1, 3, 1600)[:, None]
    image_text = {"image": growing, "text": numbers(1600, 2), "scale": torch.tensor(1.0)}
    yield "infonce, several chunks", {**image_text, "bias": None, "kind": "infonce"}


@strata
def cross_attention(numbers: Numbers) -> Iterator[tuple[str, Inputs]]:
    """The mean over heads of one batch element, which several threads add up."""
    heads = [numbers(1, 3, rows, 33) for rows in (61, 67, 67)]
    yield (
        "mean weights, several threads",
        {**dict(zip(("query", "key", "value"), heads, strict=True)), "need_weights": "mean"},
    )


def _gru_weights(numbers: Numbers, features: int, hidden: int, bias: bool, end: str = "") -> Inputs:
    return {
        f"w_ih{end}": numbers(3 * hidden, features, scale=0.1),
        f"w_hh{end}": numbers(3 * hidden, hidden, scale=0.1),
        f"b_ih{end}": numbers(3 * hidden) if bias else None,
        f"b_hh{end}": numbers(3 * hidden) if bias else None,
    }


# Steps that csrc/gru_cell makes, of weights that lie beyond a core's cache: T, B, lengths.
GRU_STEPS = ((1, 3, False), (1, 2, True), (2, 1, True), (3, 4, False), (3, 3, True))


@strata
def gru(numbers: Numbers) -> Iterator[tuple[str, Inputs]]:
    """Few steps, which packed weights do not pay for."""
    for turn, (steps, batch, with_lengths) in enumerate(GRU_STEPS):
        for reverse in (False, True):
            yield (
                f"{steps} steps of {batch}, {'back' if reverse else 'for'}wards",
                {
                    "x": numbers(steps, batch, 29),
                    "h0": numbers(batch, 205) if turn % 2 else None,
                    **_gru_weights(numbers, 29, 205, bias=turn % 3 > 0),
                    "lengths": torch.arange(batch) % (steps + 1) if with_lengths else None,
                    "reverse": reverse,
                },
            )


@strata
def gru_bidirectional(numbers: Numbers) -> Iterator[tuple[str, Inputs]]:
    """As those of gru."""
    for turn, (steps, batch, with_lengths) in enumerate(GRU_STEPS):
        yield (
            f"{steps} steps of {batch}",
            {
                "x": numbers(steps, batch, 29),
                "h0": numbers(2, batch, 205) if turn % 2 else None,
                **_gru_weights(numbers, 29, 205, bias=turn % 3 > 0),
                **_gru_weights(numbers, 29, 205, bias=turn % 3 > 0, end="_reverse"),
                "lengths": torch.arange(batch) % (steps + 1) if with_lengths else None,
            },
        )


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
        ("1x1, stride 2, wide", (1, 6, 9, 3, 69, 1), {"stride": 2, "activation": "hardswish"}),
        ("1x1, rows far apart", (1, 512, 40, 3, 3, 1), {}),
        ("1x1, groups", (2, 24, 40, 6, 7, 1), {"groups": 2}),
        ("1x1, pool", (2, 24, 40, 8, 8, 1), {"max_pool": 2, "activation": "relu"}),
        ("Winograd", (2, 32, 40, 14, 13, 3), {"padding": 1, "activation": "relu"}),
        ("Winograd, pool", (2, 24, 24, 14, 15, 3), {"padding": 1, "max_pool": 2}),
        ("Winograd, no padding", (3, 16, 17, 9, 8, 3), {"activation": "gelu"}),
        ("Winograd, wide", (1, 72, 80, 30, 30, 3), {"padding": 1}),
        ("Winograd, one tile", (1, 24, 24, 4, 4, 3), {"padding": 1}),
        ("Winograd, many tiles", (5, 16, 32, 40, 40, 3), {"padding": 1}),
        ("stem", (1, 3, 32, 24, 33, 3), {"padding": 1, "max_pool": 2, "activation": "relu"}),
        ("stem of 7x7", (1, 3, 24, 33, 34, 7), {"padding": 3, "stride": 2, "max_pool": (3, 2, 1)}),
        ("stem, silu", (1, 3, 40, 17, 35, 3), {"stride": 2, "padding": 1, "activation": "silu"}),
        ("stem of 2 channels", (1, 2, 19, 7, 21, 3), {"padding": 1, "activation": "hardswish"}),
        ("stem, planes a power of two apart", (1, 4, 40, 16, 32, 3), {"padding": 1}),
        ("depthwise", (2, 40, 40, 12, 13, 3), {"groups": 40, "padding": 1, "activation": "relu"}),
        ("depthwise 7x7", (1, 33, 33, 14, 13, 7), {"groups": 33, "padding": 3}),
        ("depthwise 5x5", (1, 40, 40, 12, 13, 5), {"groups": 40, "padding": 2}),
        ("depthwise 5x5, stride 2", (1, 40, 40, 13, 12, 5), {"groups": 40, "stride": 2}),
        ("depthwise 7x7, stride 2", (1, 40, 40, 15, 16, 7), {"groups": 40, "stride": 2}),
        ("depthwise 6x6", (1, 24, 24, 9, 10, 6), {"groups": 24, "padding": 1}),
        ("depthwise 4x4", (1, 24, 24, 9, 10, 4), {"groups": 24, "padding": 1}),
        ("depthwise 5x5, dilation", (1, 24, 24, 13, 14, 5), {"groups": 24, "dilation": 2}),
        ("depthwise, stride 2", (2, 24, 24, 13, 14, 3), {"groups": 24, "padding": 1, "stride": 2}),
        ("depthwise, two outputs", (1, 24, 48, 9, 9, 3), {"groups": 24, "padding": 1}),
        ("stride 2", (2, 24, 40, 13, 12, 3), {"stride": 2, "padding": 1, "activation": "relu"}),
        ("dilation", (1, 20, 33, 14, 13, 3), {"dilation": 2, "padding": 2}),
        ("5x5", (1, 24, 40, 12, 13, 5), {"padding": 2, "activation": "tanh"}),
        ("groups", (2, 24, 48, 10, 9, 3), {"groups": 3, "padding": 1}),
        ("groups of two, pool", (1, 4, 48, 9, 14, 3), {"groups": 2, "padding": 1, "max_pool": 2}),
        ("groups, slices", (1, 128, 70, 5, 6, 3), {"groups": 2, "padding": 1}),
        ("dilation, slices", (1, 70, 20, 7, 8, 3), {"dilation": 2, "padding": 2, "max_pool": 2}),
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
    yield from _register_tiles(numbers)


def _register_tiles(numbers: Numbers) -> Iterator[tuple[str, Inputs]]:
    """Every size of the kernels' register tiles, in the widest ISA too, with ends inside a vector.
    Activations, and whether there is a bias and a residual, take turns."""
    turn = 0

    def case(
        what: str,
        shape: tuple[int, int, int],
        out: tuple[int, int, int],
        kernel: tuple[int, int],
        last: bool,
        options: Inputs,
    ) -> tuple[str, Inputs]:
        nonlocal turn
        turn += 1
        added = options.pop("added", (turn + turn // 4) % 2 > 0)
        return f"{what}, turn {turn}", {
            "x": _image(numbers, 1, *shape, last),
            "weight": numbers(out[0], shape[0] // options.get("groups", 1), *kernel, scale=0.1),
            "bias": numbers(out[0]) if (turn + turn // 5) % 5 else None,
            "residual": _image(numbers, 1, *out, last) if added else None,
            "activation": ACTIVATIONS[(turn + turn // len(ACTIVATIONS)) % len(ACTIVATIONS)],
            **options,
        }

    for side in (3, 5, 7):
        for height in range(1, 9):
            width = 1 + (height * 11 + side) % 21
            for stride in (1, 2):
                padded: Inputs = {"groups": 19, "padding": side // 2, "stride": stride}
                shape = (19, (height - 1) * stride + 1, (width - 1) * stride + 1)
                for last in (False, True):
                    what, out = f"depthwise strips of {height} rows", (19, height, width)
                    yield case(what, shape, out, (side, side), last, dict(padded))
    for width in range(1, 17):
        channels = 19 + width % 2 * 13
        size = (channels, 3, width)
        padded = {"groups": channels, "padding": (0, 1)}
        yield case(f"depthwise rows of {width}", size, size, (1, 3), True, padded)
    for width in range(1, 29):
        stride, dilation = 1 + width % 2, 1 + width % 3 // 2
        padded = {"groups": 2, "stride": stride, "dilation": dilation, "padding": dilation}
        shape = (6, stride + 1, (width - 1) * stride + 1)
        yield case(f"grouped rows of {width}", shape, (80, 2, width), (3, 3), True, padded)
    for outputs in range(1, 11):
        width, padded = outputs * 7 % 23 + 1, {"groups": 3, "padding": 1}
        shape, out = (9, outputs, width), (3 * outputs, outputs, width)
        yield case(f"grouped strips of {outputs} outputs", shape, out, (3, 3), False, padded)
    for pixels in range(1, 15):
        step = -(-(1 << 13) // pixels)  # x is large enough for what comes next to be fetched
        shape, out, one = (8, 1, step * pixels), (40, 1, pixels), (1, 1)
        for added in (False, True):
            strided = {"added": added, "stride": (1, step)}
            yield case(f"{pixels} pixels, fetched", shape, out, one, True, strided)
        for last in (False, True):
            yield case(f"{pixels} pixels", (5, 1, pixels), out, one, last, {})
        shape, out = (16, 4, 4 * pixels), (40, 4, 4 * pixels)
        yield case(f"Winograd, {pixels} tiles", shape, out, (3, 3), True, {"padding": 1})
    for pairs in (1, 2, 3, 6):
        for channels in (2, 3):
            for outputs in (5, 12, 24):
                for pool in (None, 2):
                    relu = ("relu", None)[pairs % 2]
                    few = {"padding": 1, "max_pool": pool, "activation": relu, "added": False}
                    shape, out = (channels, 4, 2 * pairs), (outputs, 4, 2 * pairs)
                    yield case(f"few channels, {pairs} pairs", shape, out, (3, 3), pairs < 3, few)
