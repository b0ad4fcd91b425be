"""One wording for every error: what was got, what was expected, what to do.

Checks run before any kernel. Values (of lengths, say) are read only where that costs no device
synchronisation: on CPU tensors outside of compilation and tracing.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mbm_kernels._core import native, torch_private, tracing

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fail(
    op: str,
    name: str,
    got: object,
    expected: object,
    remedy: str,
    error: type[Exception] = ValueError,
) -> NoReturn:
    raise error(f"{op}: {name}: got {got}; expected {expected}; {remedy}")


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def tensor(op: str, name: str, value: object, rank: int | Sequence[int] | None = None) -> Tensor:
    """`value` if it is a Tensor of one of the ranks, else TypeError or ValueError."""
    if isinstance(value, Tensor) and (rank is None or value.dim() == rank):
        return value
    if not isinstance(value, Tensor):
        fail(op, name, describe(value), "a torch.Tensor", "convert it first", TypeError)
    if rank is not None:
        ranks = (rank,) if isinstance(rank, int) else tuple(rank)
        if value.dim() not in ranks:
            wanted = " or ".join(str(r) for r in ranks)
            fail(op, name, f"shape {list(value.shape)}", f"{wanted} dimensions", "reshape it")
    return value


def shape(op: str, name: str, value: Tensor, letters: str, sizes: Sequence[int]) -> None:
    """`letters` names the dimensions, as in "B, H"; `sizes` are what they must be."""
    if value.shape != sizes and tuple(value.shape) != tuple(sizes):
        expected = f"[{letters}] = {list(sizes)}"
        fail(op, name, f"shape {list(value.shape)}", expected, "check which tensor belongs where")


def same_floating(op: str, named: Iterable[tuple[str, Tensor | None]]) -> torch.dtype:
    """All given tensors have one floating dtype and one device; returns the dtype."""
    first_name, first, dtype, device = "", None, None, None
    for name, value in named:
        if value is None or (value.dtype == dtype and value.device == device):
            continue
        if value.dtype not in FLOATING:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            fail(op, name, value.dtype, allowed, "convert it with .to(...)", TypeError)
        if first is None:
            first_name, first, dtype, device = name, value, value.dtype, value.device
            continue
        if value.dtype != dtype:
            remedy = "convert one of them, or run under torch.autocast"
            fail(op, name, value.dtype, f"{dtype} as {first_name}", remedy, TypeError)
        fail(op, name, value.device, f"{device} as {first_name}", "move it with .to(...)")
    assert dtype is not None
    return dtype


class Remembered:
    """What checks worked out of shapes, so that the next call like it need not be checked again."""

    MOST = 4096

    def __init__(self) -> None:
        self._found: dict[Any, dict[str, int]] = {}

    def key(self, *tensors: Tensor | None) -> tuple[Any, ...] | None:
        """Their dtype and shapes; None where they differ in dtype or device, or are no tensors,
        where autocast would change them, and where something traces."""
        if torch.compiler.is_compiling() or torch_private.autocast_enabled():
            return None
        first = tensors[0]
        if not isinstance(first, Tensor):
            return None
        dtype, device = first.dtype, first.device
        key: list[Any] = [dtype]
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                continue
            if not isinstance(tensor, Tensor) or tensor.dtype is not dtype:
                return None
            if tensor.device != device:
                return None
            key.append(tensor.shape)
        return tuple(key)

    def get(self, key: tuple[Any, ...] | None) -> dict[str, int] | None:
        """A copy of the sizes that were put under `key`."""
        try:
            found = self._found.get(key)
        except TypeError:  # symbolic sizes have no hash
            return None
        return None if found is None else found.copy()

    def put(self, key: tuple[Any, ...] | None, sizes: dict[str, int]) -> None:
        if key is None:
            return
        if len(self._found) >= self.MOST:
            self._found.clear()
        try:
            self._found[key] = sizes.copy()
        except TypeError:
            return


def same_device(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        fail(op, name, value.device, f"{like.device} as {like_name}", "move it with .to(...)")


def choice(op: str, name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        fail(op, name, repr(value), f"one of {listed}", "check the spelling")


def number(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(op, name, describe(value), "a number", "convert it with float(...)", TypeError)


def index(op: str, name: str, value: object) -> None:
    """An int that int64 holds."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail(op, name, describe(value), "an int", "convert it with int(...)", TypeError)
    if not -(2**63) <= value < 2**63:
        fail(op, name, value, "an int of 64 bits", "take a smaller one")


def values_readable(value: Tensor) -> bool:
    """Whether reading values is free: a real CPU tensor, nothing tracing."""
    return value.device.type == "cpu" and tracing.is_plain((value,))


def lengths(
    op: str, name: str, value: object, batch: int, limit: int, letter: str, like: Tensor
) -> Tensor:
    """int64 [B] with 0 <= length <= limit, on any device that has values where `like` has them."""
    value = lengths_kind(op, name, value, batch, like)
    length_values(op, name, value, limit, letter)
    return value


def lengths_kind(op: str, name: str, value: object, batch: int, like: Tensor) -> Tensor:
    """As `lengths`, of which no value is read."""
    value = tensor(op, name, value, 1)
    if value.dtype != torch.int64:
        fail(op, name, value.dtype, "int64", "convert it with .long()", TypeError)
    shape(op, name, value, "B", (batch,))
    if value.device.type == "meta" and like.device.type != "meta":
        devices = " or ".join(sorted({"cpu", str(like.device)}))
        fail(op, name, value.device, f"values, on {devices}", "make them there")
    return value


def length_values(op: str, name: str, value: Tensor, limit: int, letter: str) -> None:
    """Whether 0 <= length <= limit, where that can be looked at."""
    if values_readable(value) and value.shape[0] > 0:
        low, high, _ = native.index_range(value)
        if low < 0 or high > limit:
            got = f"values from {low} to {high}"
            fail(op, name, got, f"0 <= length <= {letter} = {limit}", "clamp or correct them")


def mask(
    op: str, name: str, value: object, letters: str, sizes: Sequence[int], floating: bool = False
) -> Tensor:
    """bool (True = attend) broadcastable to `sizes`; `floating` also admits an additive mask."""
    value = tensor(op, name, value)
    if value.dtype != torch.bool and not (floating and value.dtype in FLOATING):
        expected = "bool, True = attend" + (
            ", or a floating mask that is added" if floating else ""
        )
        fail(op, name, value.dtype, expected, "convert it with .bool() or != 0", TypeError)
    aligned = tuple(sizes[len(sizes) - value.dim() :]) if value.dim() <= len(sizes) else None
    if aligned is None or any(m not in (1, s) for m, s in zip(value.shape, aligned, strict=True)):
        expected = f"broadcastable to [{letters}] = {list(sizes)}"
        fail(op, name, f"shape {list(value.shape)}", expected, "add dimensions of size 1")
    return value
