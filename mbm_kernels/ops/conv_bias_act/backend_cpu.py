"""The C++ kernels of csrc/conv_bias_act: float32 inside, 16-bit floats cast around them.

A 3x3 convolution of stride 1 with 16 channels or more goes by Winograd's F(4x4, 3x3) unless
MBM_WINOGRAD=0; every other one is direct.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import env, native, packing
from mbm_kernels.ops.conv_bias_act import geometry

# Largest error beside the direct sum's, times max|result|; measured 4e-7 to 1.9e-6 (README).
WINOGRAD_ERROR = 5e-6
WINOGRAD_CHANNELS = 16  # below, the transforms take longer than the products they save
LARGEST_POOL = 128  # places of a window that fit into seven bits

_NO_MAP = (0, 0, 0, 0, 0)
_NO_TAPS = (0, 0, 0, 0)


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    if sizes.get("pool_area", 0) > LARGEST_POOL:
        return f"it pools windows of up to {LARGEST_POOL} pixels, not {sizes['pool_area']}"
    return native.why_not(device, dtype)


class _Plan:
    """The numbers of csrc's ConvSizes, and which algorithm runs."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: str | None,
        max_pool: Sequence[int] | None,
    ):
        batch, channels, height, width = x.shape
        out_channels, group_channels, *kernel = weight.shape
        self.conv = geometry.convolved((height, width), kernel, stride, padding, dilation)
        self.out = self.conv if max_pool is None else geometry.pooled(self.conv, max_pool)
        self.batch, self.channels, self.out_channels = batch, channels, out_channels
        pool = (1, 1, 1, 1, 0, 0) if max_pool is None else tuple(max_pool)
        self.sizes = (
            *(batch, channels, out_channels, height, width, *kernel),
            *(*stride, padding[0], padding[2], *dilation, groups),
            *(*self.conv, *self.out, *pool, geometry.ACTIVATIONS.index(activation)),
        )
        self.weight_sizes = (out_channels, group_channels, *kernel, groups)
        self.winograd_backward = (
            tuple(kernel) == (3, 3)
            and tuple(stride) == tuple(dilation) == (1, 1)
            and groups == 1
            and min(channels, out_channels) >= WINOGRAD_CHANNELS
            and env.winograd()
        )
        self.winograd = self.winograd_backward and pool in ((1, 1, 1, 1, 0, 0), (2, 2, 2, 2, 0, 0))
        self.fresh = self.winograd and _fresh(batch, self.conv, out_channels)
        self.fresh_backward = self.winograd_backward and _fresh(batch, (height, width), channels)


def _fresh(batch: int, size: Sequence[int], channels: int) -> bool:
    """Whether Winograd's kernels are best transformed as they are used, when a step changes them.

    They take four times the weight's memory (512 channels: 38 MB), which few tiles do not repay.
    Measured at 64 to 512 channels.
    """
    tiles = batch * -(-size[0] // 4) * -(-size[1] // 4)
    return tiles <= min(96, channels // 4)


def _dense_weight(weight: Tensor) -> Tensor:
    """float32, contiguous or channels_last."""
    weight = weight.detach().float()
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return weight.contiguous()


def _taps(weight: Tensor | None) -> tuple[int, int, int, int]:
    """Address, and the steps of outputs, inputs and taps, of a dense weight."""
    if weight is None:
        return _NO_TAPS
    _, channels, height, width = weight.shape
    taps = height * width
    steps = (taps, 1) if weight.is_contiguous() else (1, channels)
    return weight.data_ptr(), channels * taps, *steps


@functools.cache
def _packer(
    groups: int, transposed: bool, winograd: bool, apart: tuple[int, ...]
) -> tuple[Callable[[Tensor], int], Callable[[Tensor, Tensor], None]]:
    def size(weight: Tensor) -> int:
        sizes = [*weight.shape, groups]
        return int(native.cpu().conv_packed_size(sizes, transposed, winograd))

    def pack(out: Tensor, weight: Tensor) -> None:
        dense = _dense_weight(weight)
        native.cpu().conv_pack(
            [*weight.shape, groups, *apart],
            transposed,
            winograd,
            _taps(dense),
            out.data_ptr(),
            torch.get_num_threads(),
        )

    return size, pack


def _packed(
    weight: Tensor,
    groups: int,
    transposed: bool,
    winograd: bool,
    apart: tuple[int, ...] = (1, 1, 1, 1),
) -> Tensor:
    """apart: stride and dilation, which a transposed weight is packed for."""
    return packing.packed(*_packer(groups, transposed, winograd, apart), weight)


def _dense(x: Tensor) -> Tensor:
    """float32 [B, C, Y, X] with contiguous channels or contiguous rows."""
    if x.dim() == 3:
        x = x[None]
    x = x.float()
    if x.stride(1) == 1 or x.stride(3) == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _map(x: Tensor | None) -> tuple[int, ...]:
    return _NO_MAP if x is None else (x.data_ptr(), *x.stride())


def _empty(shape: Sequence[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=torch.float32, device="cpu", memory_format=layout)


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
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, unbatched = x.dtype, x.dim() == 3
    channels_last = geometry.is_channels_last(x) or (
        not unbatched and geometry.is_channels_last(weight)
    )
    x = _dense(x)
    residual = None if residual is None else _dense(residual)
    bias = native.dense(bias)
    plan = _Plan(x, weight, stride, padding, dilation, groups, activation, max_pool)
    packed, fresh = None, None
    if save and plan.fresh:
        fresh = _dense_weight(weight)
    else:
        packed = _packed(weight, groups, False, plan.winograd)
    y = _empty((plan.batch, plan.out_channels, *plan.out), channels_last)
    places, z = geometry.saved(y, activation, max_pool, save)
    native.cpu().conv_forward(
        plan.sizes,
        _map(x),
        native.address(packed),
        _taps(fresh),
        native.address(bias),
        _map(residual),
        _map(y),
        places.data_ptr(),
        z.data_ptr(),
        plan.winograd,
        torch.get_num_threads(),
    )
    y = y.to(dtype)
    return y[0] if unbatched else y, places, z


def bwd(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    places: Tensor,
    z: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    max_pool: Sequence[int] | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    dtype, unbatched = x.dtype, x.dim() == 3
    channels_last = geometry.is_channels_last(x)
    x, grad_y = _dense(x), _dense(grad_y)
    plan = _Plan(x, weight, stride, padding, dilation, groups, activation, max_pool)
    wanted = [n and g is not None for n, g in zip(needs, (x, weight, bias, residual), strict=True)]
    grad_x = _empty(x.shape, channels_last) if wanted[0] else None
    grad_weight = native.empty(weight.shape) if wanted[1] else None
    grad_bias = native.empty((plan.out_channels,)) if wanted[2] else None
    shape = (plan.batch, plan.out_channels, *plan.conv)
    grad_residual = None
    if wanted[3] and residual is not None:
        grad_residual = _empty(shape, geometry.is_channels_last(residual))
    packed, fresh = None, None
    if wanted[0] and plan.fresh_backward:
        fresh = _dense_weight(weight)
    elif wanted[0]:
        packed = _packed(weight, groups, True, plan.winograd_backward, (*stride, *dilation))
    native.cpu().conv_backward(
        plan.sizes,
        _map(grad_y),
        _map(x),
        native.address(packed),
        _taps(fresh),
        places.data_ptr(),
        z.data_ptr(),
        _map(grad_x),
        _map(grad_residual),
        native.address(grad_weight),
        native.address(grad_bias),
        plan.winograd_backward,
        plan.winograd_backward,
        torch.get_num_threads(),
    )
    if unbatched:
        grad_x = None if grad_x is None else grad_x[0]
        grad_residual = None if grad_residual is None else grad_residual[0]
    grads = (grad_x, grad_weight, grad_bias, grad_residual)
    return tuple(None if grad is None else grad.to(dtype) for grad in grads)
