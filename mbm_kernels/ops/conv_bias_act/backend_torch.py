"""The fastest PyTorch baseline: channels_last to pool, epilogue in place, pool before relu."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import torch_private
from mbm_kernels._core.problem import derived
from mbm_kernels._core.tracing import in_functorch
from mbm_kernels.ops.conv_bias_act.activations import TABLE, Form
from mbm_kernels.ops.conv_bias_act.problem import Problem

# These commute with the maximum, gradients at ties included: all tied values have gradient 0.
POOL_FIRST = ("relu", "relu6")


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


class _Stock:
    """The functions of torch and their arguments, in a form that they take without a copy."""

    __slots__ = (
        *("activate", "activate_recorded", "contiguous", "convert", "convolution", "functorch"),
        *("pad", "pool", "pool_first"),
    )

    def __init__(self, p: Problem):
        top, bottom, left, right = p.padding
        self.functorch = in_functorch()
        # On CPUs NCHW pooling is scalar code: converting pays for itself with a pool (NOTES).
        self.convert = (
            p.max_pool is not None
            and not (p.x_channels_last or p.weight_channels_last)
            and not p.unbatched
            and p.device.type == "cpu"
            and not self.functorch  # vmap knows no memory formats
        )
        # An unbatched result is dense in [K, Y, X] whatever the weight's layout.
        self.contiguous = self.convert or p.unbatched
        # "same" with an even kernel: one more below and right
        self.pad = (0, right - left, 0, bottom - top) if (top, left) != (bottom, right) else None
        self.convolution = (p.stride, (top, left), p.dilation, p.groups)
        self.pool_first = p.activation in POOL_FIRST
        self.pool = (
            None if p.max_pool is None else (p.max_pool[:2], p.max_pool[2:4], p.max_pool[4:])
        )
        self.activate: Form | None = None
        self.activate_recorded: Form | None = None
        if p.activation is not None:
            known = TABLE[p.activation]
            self.activate_recorded = known.form(recorded=True)
            # jit.trace compares what it records with and without gradients.
            recorded = self.functorch or torch_private.jit_state() is not None
            self.activate = known.form(recorded=recorded)

    def activation(self, z: Tensor) -> Tensor:
        activate = self.activate_recorded if z.requires_grad else self.activate
        return z if activate is None else activate(z)


def fwd(
    p: Problem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    save: bool,
) -> tuple[Tensor, None, None]:
    stock = derived(p, "torch", _Stock)
    if p.x_bytes:
        x = x.to(p.dtype)
    if stock.convert:
        x = x.contiguous(memory_format=torch.channels_last)
    if stock.pad is not None:
        x = F.pad(x, stock.pad)
    z = torch.conv2d(x, weight, bias, *stock.convolution)
    if residual is not None:
        # vmap cannot write a batched residual into an unbatched result.
        z = z + residual if stock.functorch else z.add_(residual)
    if stock.activate is None and stock.pool is None:
        y = z
    elif stock.pool is None:
        y = stock.activation(z)
    elif stock.pool_first:
        y = stock.activation(F.max_pool2d(z, *stock.pool))
    else:
        y = F.max_pool2d(stock.activation(z), *stock.pool)
    return y.contiguous() if stock.contiguous else y, None, None
