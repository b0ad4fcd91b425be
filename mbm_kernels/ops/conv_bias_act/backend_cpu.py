"""The C++ kernels of csrc/conv_bias_act: float32 inside, 16-bit floats cast around them.

A 3x3 convolution of stride 1 with 16 channels or more goes by Winograd's F(4x4, 3x3) unless
MBM_WINOGRAD=0; every other one is direct.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import env, native, packing
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.conv_bias_act import geometry
from mbm_kernels.ops.conv_bias_act.problem import NO_POOL, Problem

# Largest error beside the direct sum's, times max|result|; measured 4e-7 to 2.6e-6 (README).
WINOGRAD_ERROR = 5e-6
_CPU = torch.device("cpu")
LARGEST_POOL = 128  # places of a window that fit into seven bits


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    if sizes.get("pool_area", 0) > LARGEST_POOL:
        return f"it pools windows of up to {LARGEST_POOL} pixels, not {sizes['pool_area']}"
    return native.why_not(device, dtype)


def _fresh(batch: int, size: Sequence[int], channels: int) -> bool:
    """Whether Winograd's kernels are best transformed as they are used, when a step changes them.

    They take four times the weight's memory (512 channels: 38 MB), which few tiles do not repay.
    Measured at 64 to 512 channels.
    """
    tiles = geometry.winograd_tiles(batch, size)
    return tiles <= min(96, channels // 4)


def _dense_weight(weight: Tensor) -> Tensor:
    """float32, contiguous or channels_last."""
    weight = weight.detach().float()
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return weight.contiguous()


def _taps(weight: Tensor) -> tuple[int, int, int, int]:
    """Address, and the strides of outputs, inputs and taps, of a dense weight."""
    _, channels, height, width = weight.shape
    taps = height * width
    steps = (taps, 1) if weight.is_contiguous() else (1, channels)
    return weight.data_ptr(), channels * taps, *steps


def _strided(grad: Tensor) -> Tensor:
    """float32 [B, C, Y, X] with contiguous channels or contiguous rows."""
    if grad.dim() == 3:
        grad = grad[None]
    if grad.dtype is not torch.float32:
        grad = grad.float()
    if grad.stride(1) == 1 or grad.stride(3) == 1:
        return grad
    return grad.contiguous(memory_format=torch.channels_last)


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


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(native.cpu().conv_problem_fields())


class _Map:
    """How the kernels read or write a map [B, C, Y, X]: its strides, or those of a float32 copy."""

    __slots__ = ("as_is", "layout", "strides")

    def __init__(self, shape: Sequence[int], channels_last: bool):
        self.as_is = False
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        _, channels, height, width = shape
        self.strides: tuple[int, ...]
        if channels_last:
            row = width * channels
            self.strides = (height * row, 1, row, channels)
        else:
            self.strides = (channels * height * width, height * width, width, 1)

    @classmethod
    def of(cls, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> "_Map":
        """Of a tensor that has these strides; one without contiguous channels or rows is copied."""
        strides = strides if len(strides) == 4 else (strides[0] * shape[1], *strides)
        made = cls(shape, channels_last=strides[1] == 1 or strides[3] != 1)
        if dtype is torch.float32 and 1 in (strides[1], strides[3]):
            made.as_is, made.strides = True, tuple(strides)
        return made

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.as_is:
            return tensor
        tensor = tensor[None] if tensor.dim() == 3 else tensor
        return tensor.to(torch.float32).contiguous(memory_format=self.layout)


class _Native:
    """What the kernels are told about a problem, and which algorithm runs."""

    def __init__(self, p: Problem, winograd: bool):
        out_channels, _, *kernel = p.weight_shape
        batch, channels, height, width = p.x_shape
        self.y_shape = (batch, out_channels, *p.out)
        self.x = _Map.of(p.x_shape, p.x_strides, torch.uint8 if p.x_bytes else p.dtype)
        self.y = _Map(self.y_shape, p.channels_last)
        self.grad_x = _Map(p.x_shape, p.x_channels_last)
        self.conv_shape = (batch, out_channels, *p.conv)
        self.residual = self.y
        if p.residual_strides is not None:
            self.residual = _Map.of(self.conv_shape, p.residual_strides, p.dtype)
        self.grad_residual = _Map(self.conv_shape, p.residual_channels_last)
        self.grad_weight = _Map(p.weight_shape, False)
        self.bias_as_is = p.dtype is torch.float32 and p.bias_strides in (None, (1,))
        self.plain = p.dtype is torch.float32 and not p.unbatched  # results are as written
        sizes = (*kernel, *p.stride, *p.dilation, p.groups)
        takes = geometry.takes_winograd(sizes, channels, out_channels)
        self.winograd_backward = winograd and takes
        repaid = geometry.repays_winograd(batch, p.conv, channels, out_channels)
        pools = (NO_POOL, (2, 2, 2, 2, 0, 0))
        self.winograd = self.winograd_backward and repaid and p.pool in pools
        self.fresh = self.winograd and _fresh(batch, p.conv, out_channels)
        self.fresh_backward = self.winograd_backward and _fresh(batch, (height, width), channels)
        self.packer = _packer(p.groups, False, self.winograd, (1, 1, 1, 1))
        steps = (*p.stride, *p.dilation)
        self.packer_backward = _packer(p.groups, True, self.winograd_backward, steps)
        self.block = self._block(p)
        # Whether the forward reads the weight as it lies, rather than packed.
        self.plain_weight = native.cpu().conv_kernel(self.block) == "planes"

    def _block(self, p: Problem) -> bytes:
        """csrc's ConvProblem."""
        values = dict(zip("BCYX", p.x_shape, strict=True))
        values |= dict(zip("KRS", (p.weight_shape[0], *p.weight_shape[2:]), strict=True))
        for name, pair in (("stride", p.stride), ("dilation", p.dilation)):
            values |= {f"{name}_y": pair[0], f"{name}_x": pair[1]}
        for name, pair in (("conv", p.conv), ("out", p.out)):
            values |= {f"{name}_y": pair[0], f"{name}_x": pair[1]}
        values |= {"top": p.padding[0], "left": p.padding[2], "groups": p.groups}
        names = ("pool_y", "pool_x", "pool_stride_y", "pool_stride_x", "pool_top", "pool_left")
        values |= dict(zip(names, p.pool, strict=True))
        values["activation"] = geometry.ACTIVATIONS.index(p.activation)
        for name in ("x", "residual", "y", "grad_x", "grad_residual"):
            strides = getattr(self, name).strides
            values |= {f"{name}_{axis}": s for axis, s in zip("bcyx", strides, strict=True)}
        values |= dict(zip(("weight_k", "weight_c", "weight_tap"), _steps(p), strict=True))
        values |= {
            "has_residual": int(p.residual_strides is not None),
            "winograd_forward": int(self.winograd),
            "winograd_backward": int(self.winograd_backward),
        }
        return native.block(_fields(), values)


def _steps(p: Problem) -> tuple[int, int, int]:
    """The strides of outputs, inputs and taps of a dense weight."""
    _, channels, height, width = p.weight_shape
    taps = height * width
    return (channels * taps, 1, channels) if _in_channels_last(p) else (channels * taps, taps, 1)


def _in_channels_last(p: Problem) -> bool:
    """Whether the dense weight has its channels side by side: as `_dense_weight` leaves it."""
    example = torch.empty_strided(p.weight_shape, p.weight_strides, dtype=p.dtype, device="meta")
    return not _dense_weight(example).is_contiguous()


def _native(p: Problem) -> _Native:
    winograd = env.winograd()
    return derived(p, ("cpu", winograd), lambda p: _Native(p, winograd))


def _empty(shape: Sequence[int], like: _Map) -> Tensor:
    # 1.8 us; torch.empty with a memory format takes 2.9
    return torch.empty_strided(shape, like.strides, dtype=torch.float32, device=_CPU)


def fwd(
    p: Problem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    plan = _native(p)
    if not plan.x.as_is:
        x = plan.x(x)
    if residual is not None:
        residual = plan.residual(residual)
    if not plan.bias_as_is:
        bias = native.dense(bias)
    packed = fresh = places = z = None
    if plan.plain_weight or (save and plan.fresh):
        fresh = _dense_weight(weight)
    if save:
        if p.saves_places:
            places = torch.empty(p.saved_shape, dtype=torch.uint8, device=_CPU)
        if p.saves_z:
            z = native.empty(p.saved_shape)
    if fresh is None:
        packed = packing.packed(*plan.packer, weight)
    y = _empty(plan.y_shape, plan.y)
    native.cpu().conv_forward(
        plan.block,
        (
            x.data_ptr(),
            0 if packed is None else packed.data_ptr(),
            0 if fresh is None else fresh.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
        ),
        (
            y.data_ptr(),
            0 if places is None else places.data_ptr(),
            0 if z is None else z.data_ptr(),
        ),
        torch.get_num_threads(),
    )
    if plan.plain:
        return y, places, z
    y = y.to(p.dtype)
    return y[0] if p.unbatched else y, places, z


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A forward whose weight and bias stay, as csrc's ConvSequence takes it.

    weight: addresses of the packed weight, of the weight as it is, and of the bias, 0 for none, in
    the memory of `held`.
    """

    block: bytes
    weight: tuple[int, int, int]
    held: tuple[Tensor | None, ...]
    y_shape: tuple[int, ...]
    y_strides: tuple[int, ...]

    def add_to(self, call: Any, places: Sequence[tuple[int, int]]) -> None:
        """As the next step of a ConvSequence; places: of x, of the residual and of y."""
        call.add(self.block, self.weight, places)


def constant(p: Problem, weight: Tensor, bias: Tensor | None) -> Constant | None:
    """The forward of a problem, without saving, for a weight and a bias that nobody writes.

    None where tensors must be cast or copied first.
    """
    plan = _native(p)
    if not (plan.plain and plan.x.as_is and plan.bias_as_is):
        return None
    if p.residual_strides is not None and not plan.residual.as_is:
        return None
    packed = plain = None
    if plan.plain_weight:
        plain = _dense_weight(weight)
    else:
        packed = packing.packed(*plan.packer, weight)
    held = (packed, plain, bias)
    addresses = (native.address(packed), native.address(plain), native.address(bias))
    return Constant(plan.block, addresses, held, plan.y_shape, plan.y.strides)


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    plan = _native(p)
    x, weight, bias, residual = tensors
    places, z = saved
    assert grads[0] is not None
    assert x is not None
    assert weight is not None
    grad_y = _strided(grads[0])
    if not plan.x.as_is:
        x = plan.x(x)
    grad_x = grad_weight = grad_bias = grad_residual = packed = fresh = None
    if needs[0]:
        grad_x = _empty(p.x_shape, plan.grad_x)
        if plan.fresh_backward:
            fresh = _dense_weight(weight)
        else:
            packed = packing.packed(*plan.packer_backward, weight)
    if needs[1]:
        grad_weight = _empty(p.weight_shape, plan.grad_weight)
    if needs[2] and bias is not None:
        grad_bias = native.empty(p.weight_shape[:1])
    if needs[3] and residual is not None:
        grad_residual = _empty(plan.conv_shape, plan.grad_residual)
    address = native.address
    found = (grad_x, grad_weight, grad_bias, grad_residual)
    native.cpu().conv_backward(
        plan.block,
        (grad_y.data_ptr(), *grad_y.stride()),
        (x.data_ptr(), address(packed), address(fresh), address(places), address(z)),
        tuple(map(address, found)),
        torch.get_num_threads(),
    )
    if plan.plain:
        return found
    if p.unbatched:
        grad_x = None if grad_x is None else grad_x[0]
        grad_residual = None if grad_residual is None else grad_residual[0]
        found = (grad_x, grad_weight, grad_bias, grad_residual)
    return tuple(None if grad is None else grad.to(p.dtype) for grad in found)
