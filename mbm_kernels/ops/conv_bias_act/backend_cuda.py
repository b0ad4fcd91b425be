"""The CUDA C++ kernels of csrc/conv_bias_act: few input channels, and depthwise.

Float32 inside; no copy of x or y in another layout, no host synchronisation.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import cuda_launch, native
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.conv_bias_act import geometry
from mbm_kernels.ops.conv_bias_act.problem import Problem

# The limits of conv_bias_act_cuda.h.
MOST_CHANNELS = 4
MOST_TAPS = 7
MOST_STRIDE = 2
LARGEST_POOL = 128  # places of a window that fit into seven bits
LARGEST_DEPTHWISE_POOL = 16  # whose pixels fit into shared memory with 32 channels
DEPTHWISE_TAPS = (3, 5, 7)
MOST_PIXELS = 2**29  # of an image, which kernels count in int32


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return (why_not_sizes(sizes) if sizes else None) or cuda_launch.why_not(device, dtype)


def why_not_sizes(sizes: dict[str, int]) -> str | None:
    """What is none of the device's business: sizes as a problem has them."""
    groups, kernel = sizes["groups"], (sizes["R"], sizes["S"])
    depthwise = _is_depthwise(groups, sizes["C"], sizes["K"])
    if groups > 1 and not depthwise:
        return f"of groups it takes as many as channels in and out, not {groups}"
    if groups == 1 and sizes["C"] > MOST_CHANNELS:
        return f"it takes up to {MOST_CHANNELS} channels in one group, not {sizes['C']}"
    if sizes["dilation"] != 1:
        return "it takes no dilation"
    if not 1 <= sizes["stride"] <= MOST_STRIDE:
        return f"it takes strides of 1 and {MOST_STRIDE}, the same for Y and X"
    if depthwise and (kernel[0] != kernel[1] or kernel[0] not in DEPTHWISE_TAPS):
        return "of depthwise kernels it takes 3x3, 5x5 and 7x7"
    if max(kernel) > MOST_TAPS:
        return f"it takes kernels of up to {MOST_TAPS} a side"
    most = LARGEST_DEPTHWISE_POOL if depthwise else LARGEST_POOL
    if sizes["pool_area"] > most:
        return f"it pools windows of up to {most} pixels, not {sizes['pool_area']}"
    if max(sizes["Y"] * sizes["X"], sizes["conv_y"] * sizes["conv_x"]) > MOST_PIXELS:
        return f"it counts up to {MOST_PIXELS} pixels of an image"
    return None


def _is_depthwise(groups: int, channels: int, out_channels: int) -> bool:
    return groups > 1 and groups == channels == out_channels


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(cuda_launch.module().conv_cuda_problem_fields())


def _strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    _, channels, height, width = shape
    if channels_last:
        return (height * width * channels, 1, width * channels, channels)
    return (channels * height * width, height * width, width, 1)


def _batched(strides: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Those of the form with a batch, of which an image has none."""
    return tuple(strides) if len(strides) == 4 else (shape[1] * shape[2] * shape[3], *strides)


class _Native:
    """What the kernels are told about a problem; they read x and the residual as they lie."""

    __slots__ = ("block", "conv_shape", "grad_x", "grad_z", "parts", "y", "y_shape")

    def __init__(self, p: Problem):
        batch, channels, height, width = p.x_shape
        out_channels, _, *kernel = p.weight_shape
        self.y_shape = (batch, out_channels, *p.out)
        self.conv_shape = (batch, out_channels, *p.conv)
        self.y = _strides(self.y_shape, p.channels_last)
        self.grad_x = _strides(p.x_shape, p.x_channels_last)
        self.grad_z = _strides(self.conv_shape, p.residual_channels_last)
        residual = p.residual_strides
        maps = {
            "x": _batched(p.x_strides, p.x_shape),
            "residual": (0,) * 4 if residual is None else _batched(residual, self.conv_shape),
            "y": self.y,
            "grad_x": self.grad_x,
            "grad_z": self.grad_z,
        }
        values = {"B": batch, "C": channels, "K": out_channels, "Y": height, "X": width}
        values |= dict(zip("RS", kernel, strict=True))
        for name, pair in (("stride", p.stride), ("conv", p.conv), ("out", p.out)):
            values |= {f"{name}_y": pair[0], f"{name}_x": pair[1]}
        values |= {"top": p.padding[0], "left": p.padding[2]}
        names = ("pool_y", "pool_x", "pool_stride_y", "pool_stride_x", "pool_top", "pool_left")
        values |= dict(zip(names, p.pool, strict=True))
        values |= {
            "activation": geometry.ACTIVATIONS.index(p.activation),
            "depthwise": int(_is_depthwise(p.groups, channels, out_channels)),
            "dtype": native.DTYPES.index(p.dtype),
            "z_dtype": native.DTYPES.index(p.z_dtype),
            "x_bytes": int(p.x_bytes),
        }
        for name, strides in maps.items():
            values |= {f"{name}_{axis}": s for axis, s in zip("bcyx", strides, strict=True)}
        self.block = native.block(_fields(), values)
        self.parts = cuda_launch.module().conv_cuda_parts(self.block) if batch else 0


def fwd(
    p: Problem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    plan = derived(p, "cuda", _Native)
    y = weight.new_empty_strided(plan.y_shape, plan.y)
    places = z = None
    if save and p.saves_places:
        places = weight.new_empty(p.saved_shape, dtype=torch.uint8)
    if save and p.saves_z:
        z = weight.new_empty(p.saved_shape, dtype=p.z_dtype)
    weight = weight.contiguous()  # alive until the launch, as the bias
    bias = None if bias is None else bias.contiguous()
    if y.numel():
        cuda_launch.module().conv_cuda_fwd(
            plan.block,
            native.addresses((x, weight, bias, residual)),
            native.addresses((y, places if p.by_place else None, z)),
            cuda_launch.place(p.device),
        )
    return y[0] if p.unbatched else y, places, z


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    plan = derived(p, "cuda", _Native)
    x, weight = tensors[0], tensors[1]
    grad_y = grads[0]
    assert grad_y is not None
    assert x is not None
    assert weight is not None
    need_x, need_weight, need_bias, need_residual = (
        n and t is not None for n, t in zip(needs, tensors, strict=True)
    )
    grad_x = x.new_empty_strided(p.x_shape, plan.grad_x) if need_x else None
    grad_z = weight.new_empty_strided(plan.conv_shape, plan.grad_z) if need_residual else None
    grad_weight = weight.new_empty(p.weight_shape) if need_weight else None
    grad_bias = weight.new_empty(p.weight_shape[:1]) if need_bias else None
    found = (grad_x, grad_z, grad_weight, grad_bias)
    if p.x_shape[0] == 0:
        for each in found:
            if each is not None:
                each.zero_()
    elif any(each is not None for each in found):
        parts = None
        if need_weight or need_bias:
            parts = x.new_empty(plan.parts, dtype=torch.float32)
        places, z = saved
        weight = weight.contiguous()
        cuda_launch.module().conv_cuda_bwd(
            plan.block,
            native.addresses(
                (
                    x,
                    weight,
                    grad_y,
                    places if p.saves_places and p.by_place else None,
                    z if p.saves_z else None,
                )
            ),
            _batched(grad_y.stride(), plan.y_shape),
            native.addresses((*found, parts)),
            cuda_launch.place(p.device),
        )
    if p.unbatched:
        grad_x = None if grad_x is None else grad_x[0]
        grad_z = None if grad_z is None else grad_z[0]
    return grad_x, grad_weight, grad_bias, grad_z
