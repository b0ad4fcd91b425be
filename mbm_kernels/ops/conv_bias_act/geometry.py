"""Sizes of a convolution and of a pool: arguments in any accepted form to explicit integers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels._core.tracing import in_functorch

Pair = tuple[int, int]
# In the order of csrc's enum.
ACTIVATIONS = (
    None,
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardswish",
    "sigmoid",
    "tanh",
)
BY_PLACE = (None, "relu", "relu6", "leaky_relu")  # f' has at most two values
# Pools that predicted times tell apart, by their index; any other has the index after these.
POOLS = (None, (2, 2, 2, 2, 0, 0), (3, 3, 2, 2, 1, 1))
WINOGRAD_TILE = 4  # pixels a side of its output
WINOGRAD_STREAMED = 1 << 15  # weights of a tap from which four tiles stream them from beyond L2
WINOGRAD_CHANNELS = 16  # below, the transforms take longer than the products they save
MOST_PADDING = 2**29  # of each side; kernels count its pixels in 32 bits


def pair(op: str, name: str, value: Any, least: int) -> Pair:
    """An int or a pair of ints, each at least `least`, as a pair for (Y, X)."""
    values = (value, value) if _is_int(value) else value
    if (
        not isinstance(values, (tuple, list))
        or len(values) not in (1, 2)
        or not all(_is_int(v) for v in values)
    ):
        expected = "an int or a pair of ints for (Y, X)"
        checks.fail(op, name, checks.describe(value), expected, "pass two numbers", TypeError)
    first, second = values[0], values[-1]
    if first < least or second < least:
        checks.fail(op, name, value, f"numbers >= {least}", "correct it")
    return first, second


def _bounded(op: str, name: str, got: object, padding: Sequence[int]) -> None:
    """Refuses padding that kernels could not count."""
    if any(p > MOST_PADDING for p in padding):
        checks.fail(op, name, got, f"at most {MOST_PADDING} pixels a side", "reduce it")


def taken(stride: Pair, spans: Sequence[int], sides: Sequence[int]) -> Pair:
    """The stride as it matters: one longer than the padded side is never taken."""
    # One within the kernel's span is shorter than the side, of which nothing need be asked.
    y, x = (
        step if step <= span else min(step, side)
        for step, span, side in zip(stride, spans, sides, strict=True)
    )
    return y, x


def common(numbers: Pair) -> int:
    """The value that Y and X share, 0 where they differ: a size by which a backend is chosen."""
    return numbers[0] if numbers[0] == numbers[1] else 0


def pool_taken(window: tuple[int, ...] | None, size: Pair) -> tuple[int, ...] | None:
    """The pool as it matters: None where it changes nothing, its stride as by `taken`."""
    if window is None or window == (1, 1, 1, 1, 0, 0):
        return None
    sides = [n + 2 * p for n, p in zip(size, window[4:], strict=True)]
    return (*window[:2], *taken((window[2], window[3]), window[:2], sides), *window[4:])


def pool_kind(window: Sequence[int] | None) -> int:
    """The index in POOLS, len(POOLS) where it is not among them."""
    known = None if window is None else tuple(window)
    return POOLS.index(known) if known in POOLS else len(POOLS)


def explicit_padding(
    op: str, padding: Any, kernel: Pair, stride: Pair, dilation: Pair
) -> tuple[int, int, int, int]:
    """top, bottom, left, right for an int, a pair, "same" or "valid"."""
    if isinstance(padding, str):
        checks.choice(op, "padding", padding, ("same", "valid"))
        if padding == "valid":
            return 0, 0, 0, 0
        if stride != (1, 1):
            expected = "stride 1 with padding='same'"
            checks.fail(op, "stride", stride, expected, "give the padding in numbers")
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        top, left = (t // 2 for t in total)
        same = top, total[0] - top, left, total[1] - left
        _bounded(op, "padding", f"'same' of {same}", same)
        return same
    pad_y, pad_x = pair(op, "padding", padding, 0)
    _bounded(op, "padding", padding, (pad_y, pad_x))
    return pad_y, pad_y, pad_x, pad_x


def pool_window(op: str, max_pool: Any) -> tuple[int, ...] | None:
    """kernel, stride, padding, each for (Y, X), from None, k or (kernel, stride, padding)."""
    if max_pool is None:
        return None
    if _is_int(max_pool):
        max_pool = (max_pool, max_pool, 0)
    if not isinstance(max_pool, (tuple, list)) or len(max_pool) != 3:
        expected = "None, an int, or (kernel, stride, padding)"
        remedy = "spell out all three for a window that is not square"
        checks.fail(op, "max_pool", checks.describe(max_pool), expected, remedy, TypeError)
    kernel = pair(op, "max_pool's kernel", max_pool[0], 1)
    stride = pair(op, "max_pool's stride", max_pool[1], 1)
    padding = pair(op, "max_pool's padding", max_pool[2], 0)
    _bounded(op, "max_pool's padding", padding, padding)
    if 2 * padding[0] > kernel[0] or 2 * padding[1] > kernel[1]:
        expected = f"at most half of the kernel {kernel}"
        checks.fail(op, "max_pool's padding", padding, expected, "reduce the padding")
    return (*kernel, *stride, *padding)


def convolved_size(
    op: str,
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: tuple[int, int, int, int],
    dilation: Pair,
) -> Pair:
    """(Y', X') after the convolution.

    Raises:
        ValueError: the dilated kernel is larger than the padded input.
        RuntimeError: as torch, for an image without pixels.
    """
    sizes = []
    for axis, name in enumerate("YX"):
        pixels = x.shape[x.dim() - 2 + axis]
        if pixels == 0:
            expected = f"at least one pixel in {name}"
            checks.fail(op, "x", f"shape {list(x.shape)}", expected, "drop it", RuntimeError)
        padded = pixels + padding[2 * axis] + padding[2 * axis + 1]
        span = dilation[axis] * (kernel[axis] - 1) + 1
        if span > padded:
            expected = f"a kernel within the padded input's {padded} in {name}"
            checks.fail(op, "weight", f"a dilated kernel of {span}", expected, "pad the input")
        sizes.append((padded - span) // stride[axis] + 1)
    return sizes[0], sizes[1]


def pooled_size(op: str, size: Pair, window: tuple[int, ...] | None) -> Pair:
    """(Y', X') after the pool."""
    if window is None:
        return size
    sizes = []
    for axis, name in enumerate("YX"):
        kernel, stride, padding = window[axis], window[2 + axis], window[4 + axis]
        if kernel > size[axis] + 2 * padding:
            expected = f"a kernel within the {size[axis]} of {name} and its padding"
            checks.fail(op, "max_pool", f"kernel {kernel}", expected, "use a smaller kernel")
        sizes.append((size[axis] + 2 * padding - kernel) // stride + 1)
    return sizes[0], sizes[1]


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch's convolution takes this tensor as a reason to answer in channels_last.

    The rule of ATen's is_channels_last_strides_2d: a tensor that is dense both ways, having one
    channel or one pixel, goes by its strides.
    """
    if tensor.dim() != 4 or tensor.stride(1) == 0 or in_functorch():
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        size, stride = tensor.size(axis), tensor.stride(axis)
        if size == 0 or stride < least or (axis == 0 and least == tensor.stride(1)):
            return False
        least = stride * max(size, 1)
    return True


def pooled(size: Sequence[int], window: Sequence[int]) -> Pair:
    """(Y'', X'') after a pool that fits."""
    y, x = ((size[i] + 2 * window[4 + i] - window[i]) // window[2 + i] + 1 for i in (0, 1))
    return y, x


def _is_int(value: Any) -> bool:
    # SymInt is no int; bool is, and means a mistake here.
    return (isinstance(value, int) or type(value).__name__ == "SymInt") and not isinstance(
        value, bool
    )


def takes_winograd(sizes: tuple[int, ...], channels: int, out_channels: int) -> bool:
    """Whether the cpu backend multiplies in Winograd's domain, by kernel, stride and dilation, each
    for (Y, X), and groups."""
    return sizes == (3, 3, 1, 1, 1, 1, 1) and min(channels, out_channels) >= WINOGRAD_CHANNELS


def winograd_tiles(batch: int, size: Sequence[int]) -> int:
    """Tiles of [B, Y', X'], the last ones perhaps in part."""
    return batch * -(-size[0] // WINOGRAD_TILE) * -(-size[1] // WINOGRAD_TILE)


def repays_winograd(batch: int, size: Pair, channels: int, out_channels: int) -> bool:
    """Whether the forward's tiles repay reading transformed weights, which are four times as many.

    Measured at batch 1, AVX2, one thread: 1 tile of 64 to 512 channels is 1.3 to 2.7 times as fast
    without, 4 tiles of 256 to 1024 channels 1.2 to 1.4 times, 9 tiles 0.4 to 1.1 times.
    """
    tiles = winograd_tiles(batch, size)
    return tiles > 4 or (tiles > 1 and channels * out_channels < WINOGRAD_STREAMED)
