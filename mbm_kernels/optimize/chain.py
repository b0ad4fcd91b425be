"""Convolution -> BatchNorm -> residual -> activation -> pool, run as one operation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_kernels._core import cost, dispatch, packing
from mbm_kernels._core.unchanged import Watch
from mbm_kernels.ops.conv_bias_act import backend_cpu, geometry
from mbm_kernels.ops.conv_bias_act.activations import TABLE
from mbm_kernels.ops.conv_bias_act.op import OP, convolve, described
from mbm_kernels.ops.conv_bias_act.problem import Problem
from mbm_kernels.optimize import norms
from mbm_kernels.optimize.held import OfModules

Pool = tuple[Any, Any, Any]  # kernel, stride, padding
# Nanoseconds that PyTorch takes to copy a float into another layout (1.1 to 1.3 on Ice Lake).
TURN_NS = 1.2


class Among(NamedTuple):
    """A call among others: what runs it, and the times predicted, if they are."""

    backend: str
    predicted: cost.Predicted | None
    problem: Problem | None = None  # of a convolution

    @property
    def ns(self) -> float:
        """What it is predicted to take."""
        if self.predicted is None:
            return math.nan
        call = self.predicted.call_ns
        if self.backend == "cpu":
            return self.predicted.cpu_ns - call
        return self.predicted.torch_ns + call


@dataclass(eq=False)
class Chain(OfModules):
    """The modules of one place in a container's forward, and what their functions were.

    name: the convolution's path in the model.
    """

    name: str
    conv: nn.Conv2d
    norm: Any  # a batch norm (norms.py), or None
    residual: bool
    activation: str | None
    pool: Pool | None
    backend: str = "auto"
    _folded: tuple[Any, packing.State, Tensor, Tensor | None] | None = field(
        default=None, init=False, repr=False
    )

    @property
    def was(self) -> str:
        """The classes that it stands for."""
        names = ["Conv2d"]
        names += [type(self.norm).__name__] if self.norm is not None else []
        names += ["add"] if self.residual else []
        names += [TABLE[self.activation].module] if self.activation is not None else []
        names += ["MaxPool2d"] if self.pool is not None else []
        return " + ".join(names)

    def watch_constants(self, watch: Watch) -> None:
        """Adds what a call goes by beside its tensors, the contents of `sources` and settings of
        its modules."""
        watch.attributes(self, "activation", "backend", "pool")
        for layer, kept in (
            (self.conv, ("_parameters",)),
            (self.norm, ("_parameters", "_buffers")),
        ):
            if layer is None:
                continue
            watch.attributes(layer, *kept)
            held = [vars(layer)[name] for name in kept]
            for items in held:
                watch.items(items, items)
            # nn.Module sets no plain attribute over a parameter or a buffer.
            names = ("weight", "bias", "running_mean", "running_var")
            watch.attributes(layer, *(n for n in names if not any(n in items for items in held)))

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, backend: str | None = None
    ) -> Tensor:
        """The chain's result; backend: another than its own."""
        if x.dtype is torch.uint8:  # which PyTorch's convolution refuses
            return self.stock(x, residual)
        weight, bias = (self.conv.weight, self.conv.bias) if self.norm is None else self.folded()
        conv, image = self.conv, x
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            image = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = 0
        options = (conv.stride, padding, conv.dilation, conv.groups, self.activation, self.pool)
        try:
            return convolve((image, weight, bias, residual), options, backend or self.backend)
        except (TypeError, ValueError):  # a residual that broadcasts; errors in PyTorch's words
            return self.stock(x, residual)

    def sources(self) -> tuple[Tensor | None, ...]:
        """All tensors that the weight and the bias come from."""
        if self.norm is None:
            return self.conv.weight, self.conv.bias
        return _sources(self.conv, self.norm)

    def among(self, x: Tensor, residual: Tensor | None) -> Among | None:
        """What runs this call among others; None where "cpu" cannot."""
        conv = self.conv
        if conv.padding_mode != "zeros" or x.dtype is not torch.float32 or not x.is_cpu:
            return None
        options = (conv.stride, conv.padding, conv.dilation, conv.groups)
        tensors = (x, *self.folded(), residual)
        try:
            call, _, problem = described(tensors, (*options, self.activation, self.pool), "auto")
        except (TypeError, ValueError):  # PyTorch runs it, or a residual broadcasts
            return None
        if call is None or problem is None:
            return None
        sizes = {**problem.sizes, "training": 0}
        backend = dispatch.select_among_others(
            OP.name, self.backend, problem.device, problem.dtype, sizes
        )
        return Among(backend, dispatch.predicted(OP.name, sizes), problem)

    def native(self, x: Tensor, residual: Tensor | None, y: Tensor) -> backend_cpu.Constant | None:
        """This call for a weight and a bias that stay; None where "cpu" is not what runs it among
        others, reads what must be copied first, or would not write y as that lies."""
        found = self.among(x, residual)
        if found is None or found.backend != "cpu":
            return None
        problem = found.problem
        assert problem is not None
        if geometry.is_channels_last(y) and not problem.channels_last:
            problem = replace(problem, weight_channels_last=True, derived={})
        constant = backend_cpu.constant(problem, *self.folded())
        as_wanted = constant is not None and y.stride() == constant.y_strides
        return constant if as_wanted else None

    def stock(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same by PyTorch, module by module."""
        y = self.conv(x)
        if self.norm is not None:
            y = norms.normalized(self.norm, y)
        if residual is not None:
            y = y + residual
        if self.activation is not None:
            y = TABLE[self.activation].fresh(y)
        return y if self.pool is None else F.max_pool2d(y, *self.pool)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the convolution with the BatchNorm in them, or copies where there is
        none, which nobody else writes.

        On a CPU they are kept while a hash of every byte that they come from, taken at each call,
        is the same; elsewhere they are made at each call.
        """
        conv, norm = self.conv, self.norm
        sources = self.sources()
        given = [x for x in sources if x is not None]
        if not given[0].is_cpu:
            return _fold(conv, norm)
        form = (None if norm is None else norm.eps, *[x is None for x in sources])
        kept = self._folded
        state = packing.state_of(given, None if kept is None else kept[1])
        if kept is None or kept[0] != form or not state.same(kept[1]):
            weight, bias = _fold(conv, norm)
            packing.seal(weight)
            kept = (form, state, weight, bias)
        if state is not kept[1]:
            kept = (form, state, *kept[2:])
        self._folded = kept
        return kept[2], kept[3]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_folded": None}


def _sources(conv: nn.Conv2d, norm: Any) -> tuple[Any, ...]:
    """What a folded weight and bias come from; torch's own lookup of six attributes takes 10 us."""
    layer, scale, statistics = conv._parameters, norm._parameters, norm._buffers
    try:
        return (
            layer["weight"],
            layer["bias"],
            scale["weight"],
            scale["bias"],
            statistics["running_mean"],
            statistics["running_var"],
        )
    except KeyError:  # one was made a plain attribute
        affine = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return (conv.weight, conv.bias, *affine)


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor | None]:
    """In float64, rounded once."""
    if norm is None:
        bias = None if conv.bias is None else conv.bias.detach().clone()
        return conv.weight.detach().clone(), bias
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean.double() if conv.bias is None else conv.bias.double() - mean.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = conv.weight.double() * scale[:, None, None, None]
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)
