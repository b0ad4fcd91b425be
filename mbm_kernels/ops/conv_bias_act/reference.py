"""The definition of convolution, bias, residual, activation and pooling, without tricks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels.ops.conv_bias_act import geometry

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: (
        0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    ),
    "hardswish": lambda z: z * F.relu6(z + 3) / 6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = None,
    max_pool: Any = None,
) -> Tensor:
    """x [B, C, Y, X] or [C, Y, X], weight [K, C / groups, R, S] -> [B, K, Y', X'] or [K, Y', X'].

    Bytes are taken as their values.

    Besides the public forms, padding may be (top, bottom, left, right) and max_pool six numbers.
    """
    if x.dtype == torch.uint8:
        x = x.to(weight.dtype)
    if x.dim() == 3:
        residual = None if residual is None else residual[None]
        args = (stride, padding, dilation, groups, residual, activation, max_pool)
        return conv_bias_act(x[None], weight, bias, *args)[0]
    steps = geometry.pair("reference", "stride", stride, 1)
    spread = geometry.pair("reference", "dilation", dilation, 1)
    if isinstance(padding, (int, str)) or len(padding) != 4:
        kernel = (weight.size(2), weight.size(3))
        padding = geometry.explicit_padding("reference", padding, kernel, steps, spread)
    if max_pool is not None and (isinstance(max_pool, int) or len(max_pool) != 6):
        max_pool = geometry.pool_window("reference", max_pool)
    z = convolution(x, weight, steps, padding, spread, groups)
    if bias is not None:
        z = z + bias[:, None, None]
    if residual is not None:
        z = z + residual
    y = ACTIVATIONS[activation](z)
    return y if max_pool is None else pool(y, max_pool)


def convolution(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """z[b, k, i, j] = sum over c, r, s of weight[k, c, r, s] x[b, c, i sy + r dy, j sx + s dx]."""
    top, bottom, left, right = padding
    x = F.pad(x, (left, right, top, bottom))
    channels, kernel_y, kernel_x = weight.shape[1:]
    x = x.reshape(x.size(0), groups, channels, *x.shape[2:])  # [B, G, C / G, Y, X]
    weight = weight.reshape(
        groups, weight.size(0) // groups, *weight.shape[1:]
    )  # [G, K / G, C / G, R, S]
    windows = _windows(x, (kernel_y, kernel_x), stride, dilation)
    taps = [(r, s) for r in range(kernel_y) for s in range(kernel_x)]
    parts = [
        torch.einsum("bgcyx,gkc->bgkyx", window, weight[..., r, s])
        for window, (r, s) in zip(windows, taps, strict=True)
    ]
    return torch.stack(parts).sum(0).flatten(1, 2)


def pool(y: Tensor, max_pool: Sequence[int]) -> Tensor:
    """The largest of each window; of equal ones the first has the gradient."""
    kernel, stride, (pad_y, pad_x) = max_pool[:2], max_pool[2:4], max_pool[4:]
    y = F.pad(y, (pad_x, pad_x, pad_y, pad_y), value=-math.inf)
    return torch.stack(_windows(y, kernel, stride, (1, 1))).max(0).values


def _windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[Tensor]:
    """x [..., Y, X] shifted to each tap of the kernel, row by row, and strided: [..., Y', X']."""
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[-2:], kernel, stride, dilation, strict=True)
    ]
    steps = [s * (n - 1) + 1 for n, s in zip(size, stride, strict=True)]
    return [
        x[
            ...,
            r * dilation[0] : r * dilation[0] + steps[0] : stride[0],
            s * dilation[1] : s * dilation[1] + steps[1] : stride[1],
        ]
        for r in range(kernel[0])
        for s in range(kernel[1])
    ]
