"""Sizes of a convolution and of a pool: arguments in any accepted form to explicit integers."""

from typing import Any

from torch import Tensor

from mbm_kernels._core import checks

Pair = tuple[int, int]


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
        return top, total[0] - top, left, total[1] - left
    pad_y, pad_x = pair(op, "padding", padding, 0)
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


def _is_int(value: Any) -> bool:
    # SymInt is no int; bool is, and means a mistake here.
    return (isinstance(value, int) or type(value).__name__ == "SymInt") and not isinstance(
        value, bool
    )
