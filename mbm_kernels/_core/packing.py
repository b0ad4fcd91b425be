"""Packed forms of weights, kept as long as the weight lives.

A packed form is used only while the weight's shape, strides and dtype, and a 64-bit hash of all of
its bytes taken at that very call, are those of the weight that it was packed from. So no writer can
be missed: not `weight.data`, a NumPy view, another process, nor torch's fused optimizers, which
raise no version counter. The hash reads the weight once, at the bandwidth of the cache or memory it
lies in, 2 to 3 times less than packing moves. Where weights are known to stay for several
calls, as in a loop of decoding, `unchanged()` takes it once.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native

_entries: dict[tuple[int, Callable[..., None]], "_Entry"] = {}
Version = tuple[Any, ...]


class _Trusted(threading.local):
    """The versions that `unchanged` keeps, by id(tensor), each with its tensor."""

    versions: dict[int, tuple[Tensor, Version]] | None = None  # a missing attribute takes 0.5 us


_trusted = _Trusted()


class _Entry:
    __slots__ = ("buffer", "owner", "state")

    def __init__(self, owner: "weakref.ref[Tensor]"):
        self.owner = owner
        # ISA and versions of the tensors that `buffer` was packed from; None without one.
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

    Raises:
        ValueError: the storage of a tensor was freed or is too small for its shape.
    """
    sources = (owner, *others)
    state = [native.cpu().isa(), *map(version_of, sources)]
    entry = _entry_of(owner, pack)
    found = _current(entry, state)
    return _fill(entry, state, size, pack, sources) if found is None else found


def _current(entry: _Entry, state: list[Any]) -> Tensor | None:
    buffer = entry.buffer  # before the state: another thread may write both
    return buffer if entry.state == state else None


def version_of(tensor: Tensor | None) -> Version | None:
    """Shape, strides, dtype and a hash of every byte of a CPU tensor; None for None.

    Raises:
        ValueError: the tensor's storage was freed or is too small for its shape.
    """
    if tensor is None:
        return None
    versions = _trusted.versions
    if versions is None:
        return _hashed(tensor)
    known = versions.get(id(tensor))
    if known is None:
        known = versions[id(tensor)] = (tensor, _hashed(tensor))
    return known[1]


def _hashed(tensor: Tensor) -> Version:
    return (tensor.shape, tensor.stride(), tensor.dtype, native.fingerprint(tensor))


@contextmanager
def unchanged() -> Iterator[None]:
    """Within this context, in this thread, each weight is hashed once, at its first use.

    The caller answers for it that no weight is written meanwhile; what is packed later in the
    context would be of the new values, what was packed before of the old ones.
    """
    if _trusted.versions is not None:
        yield
        return
    _trusted.versions = {}
    try:
        yield
    finally:
        _trusted.versions = None


def _entry_of(owner: Tensor, pack: Callable[..., None]) -> _Entry:
    key = (id(owner), pack)
    entry = _entries.get(key)
    if entry is None or entry.owner() is not owner:  # an id may be used again
        drop = _entries.pop  # bound: at exit a module's names go before its weights
        entry = _entries[key] = _Entry(weakref.ref(owner, lambda _: drop(key, None)))
    return entry


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
    """Drops what is kept of a tensor: the packed forms of a weight, and their memory.

    Results never depend on it: a packed form is used only while a hash of the whole weight is the
    same. It is for memory, and for `torch.utils.swap_tensors`, which refuses a tensor to which a
    weak reference is held.
    """
    # A copy: another thread may add an entry, and the garbage collector drop one.
    for key in _entries.copy():
        if key[0] == id(weight):
            _entries.pop(key, None)
