"""Packed forms of weights, kept as long as the weight lives and redone when it changes.

A change is seen by the version counter that torch raises at every in-place write (optimizers,
`copy_`, `load_state_dict`), by a new address, or by 32 samples of the values. Writing through
`weight.data` or a NumPy view raises no counter: the samples see it where the whole weight is
written (an average of weights, an initialisation); call `forget(weight)` after writing a few
numbers of it in that way.
"""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native

_entries: dict[tuple[int, Callable[..., None]], "_Entry"] = {}


class _Entry:
    __slots__ = ("buffer", "owner", "state")

    def __init__(self, owner: "weakref.ref[Tensor]"):
        self.owner = owner
        self.state: list[Any] | None = None
        self.buffer: Tensor | None = None


def packed(
    size: Callable[..., int], pack: Callable[..., None], owner: Tensor, *others: Tensor | None
) -> Tensor:
    """The packed form of `owner` and `others`, a float32 vector.

    Args:
        size: size(owner, *others), elements of the packed form in the ISA in use.
        pack: pack(out, owner, *others) writes it. The buffer is written again when a weight
            changes, so that training touches no new pages each step, unless a kernel is
            about to read it. One form is kept for each owner and `pack`.
        owner: the weight with whose life the entry ends.
        others: further tensors packed with it; an entry made with others is redone.
    """
    sources = (owner, *others)
    state = _state_of(sources)
    if state is None:
        unkept = native.empty((size(*sources),))
        pack(unkept, *sources)
        return unkept
    entry = _entry_of(owner, pack)
    found = _current(entry, state)
    return _fill(entry, state, size, pack, sources) if found is None else found


def _entries_of(owner: Tensor) -> list[tuple[tuple[int, Callable[..., None]], _Entry]]:
    # A copy: another thread may add an entry, and the garbage collector drop one.
    return [(key, entry) for key, entry in _entries.copy().items() if key[0] == id(owner)]


def _state_of(sources: tuple[Tensor | None, ...]) -> list[Any] | None:
    """Changes whenever what would be packed may; None where that cannot be told."""
    state: list[Any] = [native.cpu().isa()]
    for tensor in sources:
        if tensor is None:
            state.append(None)
        elif tensor.is_inference():  # counts no versions
            return None
        else:
            state += (tensor.data_ptr(), tensor._version, native.sample(tensor))
    return state


def _entry_of(owner: Tensor, pack: Callable[..., None]) -> _Entry:
    key = (id(owner), pack)
    entry = _entries.get(key)
    if entry is None or entry.owner() is not owner:  # an id may be used again
        drop = _entries.pop  # bound: at exit a module's names go before its weights
        entry = _entries[key] = _Entry(weakref.ref(owner, lambda _: drop(key, None)))
    return entry


def _current(entry: _Entry, state: list[Any]) -> Tensor | None:
    buffer = entry.buffer  # before the state: another thread may write both
    return buffer if entry.state == state else None


def _held_here() -> int:
    kept = object()
    return sys.getrefcount(kept)


_HELD_HERE = _held_here()  # references to what one local name holds


def _fill(
    entry: _Entry,
    state: list[Any],
    size: Callable[..., int],
    pack: Callable[..., None],
    sources: tuple[Tensor | None, ...],
) -> Tensor:
    elements = size(*sources)
    kept, entry.buffer, entry.state = entry.buffer, None, None
    # Whoever else holds it is about to run a kernel on it, in this thread or another.
    if kept is not None and kept.numel() == elements and sys.getrefcount(kept) == _HELD_HERE:
        fresh = kept
    else:
        with torch.inference_mode(False):  # one made in it could not be written outside
            fresh = native.empty((elements,))
    pack(fresh, *sources)
    entry.buffer, entry.state = fresh, state
    return fresh


def _panels_size(weight: Tensor) -> int:
    return int(native.cpu().concat_linear_packed_size(*weight.shape))


def _pack_panels(out: Tensor, weight: Tensor) -> None:
    dense = native.dense(weight)
    native.cpu().concat_linear_pack(
        *weight.shape, dense.data_ptr(), out.data_ptr(), torch.get_num_threads()
    )


def panels(weight: Tensor) -> Tensor:
    """A linear layer's weight [K, C] as the second operand of csrc/common/gemm.h."""
    return packed(_panels_size, _pack_panels, weight)


def forget(weight: Tensor) -> None:
    """Drops what was packed from `weight`: for writes that its version counter does not see."""
    for key, _ in _entries_of(weight):
        _entries.pop(key, None)
