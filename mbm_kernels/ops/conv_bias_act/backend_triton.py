"""The Triton kernels: a convolution, torch's or one of ours, and everything around it in one pass.

Which one runs is looked up in launch.json, "choices": "aten", "gemm" or "depthwise", each of
forward, grad_x and grad_weight by itself. No host synchronisation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div
from mbm_kernels.ops.conv_bias_act.plan import Plan
from mbm_kernels.ops.conv_bias_act.problem import NO_POOL, Problem

LARGEST_POOL = 128  # places of a window that fit into seven bits
# Of one share of a gradient, by size alone, so that results depend on nothing else. Estimated.
BIAS_CELLS = 128
WEIGHT_PIXELS = 2048  # 245 programs at B 32, 64 channels of 56x56; 4 times as many for few taps
FEW_TAPS = 32
STEM_CHANNELS = 15  # with fewer than a vector's, taps and channels are summed as one index
MOST_PIXELS = 2**30  # of the batch: kernels count them in int32


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    if sizes.get("pool_area", 0) > LARGEST_POOL:
        return f"it pools windows of up to {LARGEST_POOL} pixels, not {sizes['pool_area']}"
    if sizes.get("B", 0) * sizes.get("Y", 0) * sizes.get("X", 0) > MOST_PIXELS:
        return f"it counts up to {MOST_PIXELS} pixels of a batch"
    return triton_launch.why_not(device, dtype)


def _batched(x: Tensor) -> Tensor:
    return x[None] if x.dim() == 3 else x


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def _present(x: Tensor | None, use: bool = True) -> Tensor | None:
    """What was saved, None where there is nothing in it."""
    return x if use and x is not None and x.dim() == 4 else None


def fwd(
    p: Problem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    plan = Plan(p, _batched(x), weight)
    residual = None if residual is None else _batched(residual)
    y = plan.empty(plan.K, plan.out)
    places = z = None
    if save and p.saves_places:
        places = y.new_empty(p.saved_shape, dtype=torch.uint8)
    if save and p.saves_z:
        z = y.new_empty(p.saved_shape, dtype=p.z_dtype)
    kept = (places if p.by_place else None, z)
    way = plan.way("forward")
    if way == "aten":
        _epilogue(plan, _aten_convolution(plan), bias, residual, y, *kept)
    else:
        run = _gemm if way == "gemm" else _depthwise
        run(plan, plan.x, y, False, bias, residual, *kept)
    return y[0] if p.unbatched else y, places, z


def _gemm(
    plan: Plan,
    x: Tensor,
    y: Tensor,
    turned: bool,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    places: Tensor | None = None,
    z: Tensor | None = None,
) -> None:
    """The forward; if `turned`, the gradient of x by flipped kernels: `y` from that of the result,
    `x`, without an epilogue."""
    weight = plan.weight
    if 1 not in (weight.stride(1), weight[:, :, 0, 0].numel() // weight.size(0)):
        weight = weight.contiguous(memory_format=torch.channels_last)
    w_k, w_c, w_r, w_s = weight.stride()
    top, left = plan.padding[0], plan.padding[2]
    if turned:
        w_k, w_c = w_c, w_k
        top, left = weight.size(2) - 1 - top, weight.size(3) - 1 - left
    pixels = y.size(0) * y.size(2) * y.size(3)
    C, K = x.size(1), y.size(1)
    pool = 1 if turned else plan.pool[0]
    name = "conv_grad_x" if turned else "conv_pool" if pool == 2 else "conv"
    plan.launch(
        "conv_stem" if C <= STEM_CHANNELS else name,
        lambda c: (ceil_div(pixels, c["BLOCK_P"]) * ceil_div(K, c["BLOCK_K"]),),
        *(x, weight, bias, residual, y, places, z, plan.B, C, K, *x.shape[2:], *y.shape[2:]),
        *(top, left, *x.stride(), w_k, w_c, w_r, w_s, 0 if bias is None else bias.stride(0)),
        *(*_strides(residual), *y.stride()),
        sizes={**plan.sizes, "C": C, "K": K},
        ACT="none" if turned else plan.act,
        K_LAST=y.stride(1) == 1,
        **plan.kernel_constants(turned),
        TURN=turned,
        POOL=pool,
        TF32=plan.tf32,
    )


def _depthwise(
    plan: Plan,
    x: Tensor,
    y: Tensor,
    turned: bool,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    places: Tensor | None = None,
    z: Tensor | None = None,
) -> None:
    """As `_gemm`."""
    w_k, _, w_r, w_s = plan.weight.stride()
    top, left = plan.padding[0], plan.padding[2]
    if turned:
        top, left = plan.weight.size(2) - 1 - top, plan.weight.size(3) - 1 - left
    pixels = y.size(0) * y.size(2) * y.size(3)
    plan.launch(
        "depthwise_grad_x" if turned else "depthwise",
        lambda c: (ceil_div(pixels, c["BLOCK_P"]) * ceil_div(plan.K, c["BLOCK_K"]),),
        *(x, plan.weight, bias, residual, y, places, z, plan.B, plan.K, *x.shape[2:]),
        *(*y.shape[2:], top, left, *x.stride(), w_k, w_r, w_s),
        *(0 if bias is None else bias.stride(0), *_strides(residual), *y.stride()),
        ACT="none" if turned else plan.act,
        K_LAST=y.stride(1) == 1,
        **plan.kernel_constants(turned),
        TURN=turned,
        POOL=1 if turned else plan.pool[0],
    )


def _aten_convolution(plan: Plan) -> Tensor:
    x, top_left = _padded(plan)
    return torch.convolution(
        x, plan.weight, None, plan.stride, top_left, plan.dilation, False, [0, 0], plan.groups
    )


def _padded(plan: Plan) -> tuple[Tensor, list[int]]:
    """x with what torch cannot pad by itself, more below or right, and torch's padding."""
    top, bottom, left, right = plan.padding
    x = plan.x
    if top != bottom or left != right:
        x = torch.nn.functional.pad(x, (0, right - left, 0, bottom - top))
    return x, [top, left]


def _rows(maps: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Maps [B, K, Y, X] as [B, K, 1, Y X] where all of them lie so, for whole vectors."""
    dense = all(m is None or m.stride(2) == m.size(3) * m.stride(3) for m in maps)
    if not dense:
        return list(maps)
    return [None if m is None else m.view(m.size(0), m.size(1), 1, -1) for m in maps]


def _epilogue(
    plan: Plan,
    u: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    places: Tensor | None,
    z: Tensor | None,
) -> None:
    maps: list[Any] = [u, residual, y]
    if plan.pool == NO_POOL and 0 not in y.shape:
        maps = _rows(maps)
    u, residual, y = maps
    pixels = y.size(0) * y.size(2) * y.size(3)
    plan.launch(
        "epilogue",
        lambda c: (ceil_div(pixels, c["BLOCK_P"]) * ceil_div(plan.K, c["BLOCK_K"]),),
        *(u, bias, residual, y, places, z, plan.B, plan.K, *u.shape[2:], *y.shape[2:]),
        0 if bias is None else bias.stride(0),
        *(*u.stride(), *_strides(residual), *y.stride()),
        ACT=plan.act,
        K_LAST=y.stride(1) == 1,
        **plan.pool_constants,
    )


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    x, weight = tensors[0], tensors[1]
    assert grads[0] is not None
    assert x is not None
    assert weight is not None
    plan = Plan(p, _batched(x), weight)
    need_x, need_weight, need_bias, need_residual = (
        n and t is not None for n, t in zip(needs, tensors, strict=True)
    )
    places, z = saved
    kept = (_present(places, p.by_place), _present(z))
    plain = not p.saves_places and not need_residual
    grad_y = _batched(grads[0])
    grad_z: Any = grad_y
    grad_bias = None
    if not plain or need_bias:
        need_map = not plain and (need_x or need_weight or need_residual)
        made, grad_bias = _grad_epilogue(plan, grad_y, *kept, need_map, need_bias)
        grad_z = grad_z if plain else made
    grad_x, grad_weight = _gradients(plan, grad_z, need_x, need_weight)
    grad_residual = grad_z if need_residual else None
    if p.unbatched:
        grad_x = None if grad_x is None else grad_x[0]
        grad_residual = None if grad_residual is None else grad_residual[0]
    return grad_x, grad_weight, grad_bias, grad_residual


def _grad_epilogue(
    plan: Plan,
    grad_y: Tensor,
    places: Tensor | None,
    z: Tensor | None,
    need_map: bool,
    need_bias: bool,
) -> tuple[Any, Tensor | None]:
    """The gradients of the convolution's result and of the bias."""
    grad_z = plan.empty(plan.K, plan.conv) if need_map else None
    maps: list[Any] = [grad_y, grad_z]
    if plan.pool == NO_POOL and 0 not in grad_y.shape:
        maps = _rows(maps)
    grad_y, to = maps
    conv = plan.conv if to is None else to.shape[2:]
    if plan.pool == NO_POOL:
        conv = grad_y.shape[2:]
    cells = [ceil_div(conv[i] + plan.pool[4 + i], plan.pool[2 + i]) for i in (0, 1)]
    blocks = ceil_div(plan.B * cells[0] * cells[1], BIAS_CELLS)
    parts = None
    if need_bias:
        parts = torch.empty((blocks, plan.K), dtype=torch.float32, device=grad_y.device)
    plan.launch(
        "grad_epilogue",
        lambda c: (blocks * ceil_div(plan.K, c["BLOCK_K"]),),
        *(
            grad_y,
            places,
            z,
            to,
            parts,
            plan.B,
            plan.K,
            *conv,
            *grad_y.shape[2:],
            *cells,
            BIAS_CELLS,
        ),
        *(*grad_y.stride(), *_strides(to)),
        ACT=plan.act,
        K_LAST=plan.channels_last,
        **plan.pool_constants,
    )
    return grad_z, None if parts is None else parts.sum(0).to(plan.x.dtype)


def _gradients(
    plan: Plan, grad_z: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    way_x = plan.way("grad_x") if need_x else ""
    way_weight = plan.way("grad_weight") if need_weight else ""
    grad_x, grad_weight = None, None
    if "aten" in (way_x, way_weight):
        grad_x, grad_weight = _aten_gradients(plan, grad_z, way_x == "aten", way_weight == "aten")
    if way_x in ("gemm", "depthwise"):
        grad_x = plan.empty(plan.x.size(1), plan.x.shape[2:])
        (_gemm if way_x == "gemm" else _depthwise)(plan, grad_z, grad_x, True)
    if way_weight == "gemm":
        grad_weight = _gemm_grad_weight(plan, grad_z)
    elif way_weight == "depthwise":
        grad_weight = _depthwise_grad_weight(plan, grad_z)
    return grad_x, grad_weight


def _gemm_grad_weight(plan: Plan, grad_z: Tensor) -> Tensor:
    C, (R, S) = plan.x.size(1), plan.weight.shape[2:]
    chunk = WEIGHT_PIXELS if R * S * C > FEW_TAPS else 4 * WEIGHT_PIXELS
    count = ceil_div(plan.B * plan.conv[0] * plan.conv[1], chunk)
    parts = grad_z.new_empty((count, plan.K, R, S, C), dtype=torch.float32)
    plan.launch(
        "conv_grad_weight",
        lambda c: (ceil_div(R * S * C, c["BLOCK_N"]) * ceil_div(plan.K, c["BLOCK_K"]) * count,),
        *(grad_z, plan.x, parts, plan.B, C, plan.K, *plan.x.shape[2:], *plan.conv, chunk),
        *(plan.padding[0], plan.padding[2], *grad_z.stride(), *plan.x.stride()),
        **plan.kernel_constants(),
        TF32=plan.tf32,
    )
    return _like_weight(plan, parts.sum(0).permute(0, 3, 1, 2))


def _depthwise_grad_weight(plan: Plan, grad_z: Tensor) -> Tensor:
    R, S = plan.weight.shape[2:]
    count = ceil_div(plan.B * plan.conv[0] * plan.conv[1], WEIGHT_PIXELS)
    parts = grad_z.new_empty((count, R, S, 1, plan.K), dtype=torch.float32)
    plan.launch(
        "depthwise_grad_weight",
        lambda c: (R * S * ceil_div(plan.K, c["BLOCK_K"]) * count,),
        *(grad_z, plan.x, parts, plan.B, plan.K, *plan.x.shape[2:], *plan.conv, WEIGHT_PIXELS),
        *(plan.padding[0], plan.padding[2], *grad_z.stride(), *plan.x.stride()),
        K_LAST=plan.channels_last,
        **plan.kernel_constants(),
    )
    return _like_weight(plan, parts.sum(0).permute(3, 2, 0, 1))


def _like_weight(plan: Plan, grad: Tensor) -> Tensor:
    layout = torch.contiguous_format
    if not plan.weight.is_contiguous():
        layout = torch.channels_last
    return grad.to(plan.weight.dtype, memory_format=layout)


def _aten_gradients(
    plan: Plan, grad_z: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    x, top_left = _padded(plan)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(grad_z, x, plan.weight, None, plan.stride, top_left, plan.dilation, False, [0, 0]),
        *(plan.groups, [need_x, need_weight, False]),
    )
    if grad_x is not None and grad_x.shape != plan.x.shape:
        grad_x = grad_x[..., : plan.x.size(2), : plan.x.size(3)]
    return grad_x, grad_weight
