"""The best stock form: channels_last inside where it pools, in-place epilogue, pool before relu."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core.tracing import in_functorch
from mbm_kernels.ops.conv_bias_act import geometry

# In place only where autograd keeps the result rather than the input: the others would be copied.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": lambda z: F.relu6(z, inplace=True),
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}
FRESH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardswish": F.hardswish,
}
# Where nothing is differentiated, these too.
IN_PLACE_UNRECORDED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda z: F.silu(z, inplace=True),
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": lambda z: torch.ops.aten.gelu_.default(z, approximate="tanh"),
    "hardswish": lambda z: F.hardswish(z, inplace=True),
}
# These commute with the maximum, gradients at ties included: all tied values have gradient 0.
POOL_FIRST = ("relu", "relu6")


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    max_pool: Sequence[int] | None,
    save: bool,
) -> tuple[Tensor, None, None]:
    channels_last = geometry.is_channels_last(x) or geometry.is_channels_last(weight)
    # On CPUs NCHW pooling is scalar code: converting pays for itself once there is a pool (README).
    convert = (
        max_pool is not None
        and not channels_last
        and x.dim() == 4
        and x.device.type == "cpu"
        and not in_functorch()  # vmap knows no memory formats
    )
    if convert:
        x = x.contiguous(memory_format=torch.channels_last)
    z = _convolution(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        # vmap cannot write a batched residual into an unbatched result.
        z = z + residual if in_functorch() else z.add_(residual)
    if max_pool is not None and activation in POOL_FIRST:
        y = _activate(_pool(z, max_pool), activation)
    else:
        y = _activate(z, activation)
        y = y if max_pool is None else _pool(y, max_pool)
    # An unbatched result is dense in [K, Y, X] whatever the weight's layout.
    y = y.contiguous() if convert or x.dim() == 3 else y
    return y, None, None


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    top, bottom, left, right = padding
    if top != bottom or left != right:  # "same" with an even kernel: one more below and right
        x = F.pad(x, (0, right - left, 0, bottom - top))
    return F.conv2d(x, weight, bias, list(stride), [top, left], list(dilation), groups)


def _activate(z: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return z
    if activation in IN_PLACE:
        return IN_PLACE[activation](z)
    return (FRESH if z.requires_grad or in_functorch() else IN_PLACE_UNRECORDED)[activation](z)


def _pool(y: Tensor, max_pool: Sequence[int]) -> Tensor:
    kernel, stride, padding = (list(max_pool[i : i + 2]) for i in (0, 2, 4))
    return F.max_pool2d(y, kernel, stride, padding)
