"""Drawn inputs of every operation: hypothesis strategies over shapes, layouts, lengths and masks.

`drawn(op, large)` is a strategy; `large` puts each dimension that a kernel cuts past one of its
tiles (at the widest ISA: 14 rows, 32 columns, 256 terms of a sum; attention's 64 queries or keys,
the losses' 112 classes), else sizes end below or a little over a vector. A new operation is one
function with `@draws`. Everything is decided by what hypothesis draws, so that a derandomised run
repeats itself. What no run may leave to chance, such as each algorithm of an operation, is one of
its `strata`, and `drawn` takes one.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mbm_kernels.testing import conv_cases
from mbm_kernels.testing.draws import (
    CLASSES,
    COLUMNS,
    DEPTH,
    POSITIONS,
    ROWS,
    STRATA,
    STRATEGIES,
    Draws,
    Inputs,
    draws,
)
from mbm_kernels.testing.layouts import LAYOUTS, relayout

IGNORED = -100


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


def is_clear(op: str, inputs: Inputs) -> bool:
    """Whether no rounding decides which of two gradients is right: conv_bias_act has kinks and
    maxima, and near one of them float32 may go the other way."""
    return op != "conv_bias_act" or conv_cases.is_clear(**inputs)


@draws
def additive_attention(given: Draws) -> Inputs:
    batch = given.between(1, 3)
    chunk = given.flag()  # past a chunk of queries, or past a piece of keys: both take too long
    steps = given.size(POSITIONS if chunk else 4)
    positions = given.size(4 if chunk else POSITIONS)
    features, values = given.size(128), given.size(COLUMNS)
    inputs: Inputs = {
        "query": given.randn(batch, steps, features) * given.scale,
        "key": given.randn(batch, positions, features) * given.scale,
        "value": given.randn(batch, positions, values),
        "v": given.randn(features) * features**-0.5,
        "key_lengths": given.lengths(batch, positions),
        "mask": given.mask(
            (batch, steps, positions), (batch, 1, positions), (steps, positions), (positions,)
        ),
    }
    return inputs


@draws
def cross_attention(given: Draws) -> Inputs:
    batch, heads = given.between(1, 2), given.between(1, 3)
    steps, positions = given.size(ROWS), given.size(POSITIONS)
    features, values = given.size(COLUMNS), given.size(COLUMNS)
    mask = given.mask(
        (batch, heads, steps, positions),
        (batch, 1, 1, positions),
        (heads, 1, positions),
        (steps, positions),
    )
    if mask is not None and given.flag():  # an addend in its place, that hides some positions
        shown, mask = mask, given.randn(*mask.shape)
        # As libraries write padding, whole rows of it too; -1e30 leaves no score even in float64.
        large = given.of(None, None, -1e9, -1e30)
        if large is not None:
            mask[~shown] = large
            mask[..., : 1 + mask.size(-2) // 3, :] = large
            shown = torch.rand(mask.shape, generator=given.generator) < 0.8
        mask[~shown] = -torch.inf
    return {
        "query": given.randn(batch, heads, steps, features) * given.scale,
        "key": given.randn(batch, heads, positions, features),
        "value": given.randn(batch, heads, positions, values),
        "key_lengths": given.lengths(batch, positions),
        "mask": mask,
        "scale": given.of(None, 0.3, -0.2),
        "need_weights": given.of(None, "mean", "heads"),
    }


@draws
def concat_linear(given: Draws) -> Inputs:
    batch, steps = given.between(2, 4), given.size(ROWS)
    leads = given.of(
        ((batch, steps), (batch, 1)),
        ((batch, 1), (batch, steps)),
        ((batch, steps), (batch, steps)),
        ((batch, steps),),
        ((batch, steps), (1, steps), (batch, 1)),
        ((batch, 1), (steps,)),
        ((), (batch, steps)),
    )
    widths = [given.size(DEPTH, 37) for _ in leads]
    outputs = given.size(COLUMNS)
    return {
        "inputs": [
            given.randn(*lead, c) * given.scale for lead, c in zip(leads, widths, strict=True)
        ],
        "weight": given.randn(outputs, sum(widths)) * sum(widths) ** -0.5,
        "bias": given.randn(outputs) if given.flag() else None,
    }


def _gru_weights(given: Draws, inputs: int, units: int) -> Inputs:
    bound = units**-0.5  # the spread of a trained layer
    bias = given.flag()
    return {
        "w_ih": given.randn(3 * units, inputs) * bound,
        "w_hh": given.randn(3 * units, units) * bound,
        "b_ih": given.randn(3 * units) * bound if bias else None,
        "b_hh": given.randn(3 * units) * bound if bias else None,
    }


def _gru_sizes(given: Draws) -> tuple[int, int, int]:
    """Rows, inputs, units; units past the depth of a sum once in four, since they cost most."""
    deep = given.of(True, False, False, False)
    rows = given.of(1, given.size(ROWS), given.size(ROWS))
    return rows, given.size(DEPTH), given.size(DEPTH if deep else COLUMNS, 40)


@draws
def gru(given: Draws) -> Inputs:
    steps = given.between(1, 6)
    rows, inputs, units = _gru_sizes(given)
    return {
        "x": given.randn(steps, rows, inputs) * given.scale,
        "h0": given.randn(rows, units) if given.flag() else None,
        **_gru_weights(given, inputs, units),
        "lengths": given.lengths(rows, steps),
        "reverse": given.flag(),
    }


@draws
def gru_bidirectional(given: Draws) -> Inputs:
    steps = given.between(1, 6)
    rows, inputs, units = _gru_sizes(given)
    weights, others = _gru_weights(given, inputs, units), _gru_weights(given, inputs, units)
    return {
        "x": given.randn(steps, rows, inputs) * given.scale,
        "h0": given.randn(2, rows, units) if given.flag() else None,
        **weights,
        **{f"{name}_reverse": value for name, value in others.items()},
        "lengths": given.lengths(rows, steps),
    }


@draws
def gru_cell(given: Draws) -> Inputs:
    rows, inputs, units = _gru_sizes(given)
    x, h = given.randn(rows, inputs) * given.scale, given.randn(rows, units)
    return {"x": x, "h": h, **_gru_weights(given, inputs, units)}


def _targets(given: Draws, classes: int, lead: tuple[int, ...]) -> Tensor:
    target = given.integers(0, classes, *lead)
    share = given.of(0.0, 0.3, 0.9)
    target[torch.rand(lead, generator=given.generator) < share] = IGNORED
    if bool((target == IGNORED).all()):
        target.view(-1)[0] = 0
    return target


@draws
def linear_cross_entropy(given: Draws) -> Inputs:
    features, classes = given.size(DEPTH), given.size(4 * COLUMNS, 40)
    lead = given.lead(given.size(COLUMNS))
    return {
        "hidden": given.randn(*lead, features) * given.scale,
        "weight": given.randn(classes, features) * features**-0.5,
        "target": _targets(given, classes, lead),
        "bias": given.randn(classes) if given.flag() else None,
        "label_smoothing": given.of(0.0, 0.0, 0.1),
        "softcap": given.of(None, None, 2.5),
        "z_loss": given.of(0.0, 0.0, 0.1),
        "reduction": given.of("mean", "sum", "none"),
    }


@draws
def linear_topk(given: Draws) -> Inputs:
    features, classes = given.size(DEPTH), given.size(8 * COLUMNS, 40)
    return {
        "hidden": given.randn(*given.lead(given.size(ROWS)), features) * given.scale,
        "weight": given.randn(classes, features) * features**-0.5,
        "bias": given.randn(classes) if given.flag() else None,
        "k": given.between(1, min(classes, 8)),
    }


@draws
def linear_distillation_loss(given: Draws) -> Inputs:
    features, classes = given.size(DEPTH), given.size(4 * COLUMNS, 40)
    lead = given.lead(given.size(COLUMNS))
    inputs: Inputs = {
        "student_hidden": given.randn(*lead, features) * given.scale,
        "student_weight": given.randn(classes, features) * features**-0.5,
        "target": _targets(given, classes, lead),
        "student_bias": given.randn(classes) if given.flag() else None,
    }
    match given.of("hidden", "hidden", "logits", "topk"):
        case "hidden":
            width = given.size(DEPTH)
            inputs["teacher_hidden"] = given.randn(*lead, width)
            inputs["teacher_weight"] = given.randn(classes, width) * width**-0.5
            inputs["teacher_bias"] = given.randn(classes) if given.flag() else None
        case "logits":
            inputs["teacher_logits"] = 2 * given.randn(*lead, classes)
        case "topk":
            values = (2 * given.randn(*lead, classes)).log_softmax(-1)
            log_probs, ids = values.topk(given.between(1, min(classes, 20)))
            inputs["teacher_topk"] = (ids, log_probs)
    return inputs | {
        "temperature": given.of(1.0, 2.0, 0.7),
        "hard_weight": given.of(0.5, 0.5, 0.0, 1.0),
        "divergence": given.of("forward_kl", "reverse_kl", "jsd"),
        "beta": given.of(0.5, 0.3, 0.0, 1.0),
        "reduction": given.of("mean", "sum", "none"),
    }


@draws
def contrastive_loss(given: Draws) -> Inputs:
    batch, features = given.size(CLASSES), given.size(DEPTH)
    kind = given.of("infonce", "siglip")
    spread = given.scale * features**-0.25  # logits as large as the scale squared
    return {
        "image": given.randn(batch, features) * spread,
        "text": given.randn(batch, features) * spread,
        "scale": torch.tensor(given.of(1.3, 5.0), dtype=torch.float64),
        "bias": torch.tensor(-1.7, dtype=torch.float64) if kind == "siglip" else None,
        "kind": kind,
    }
