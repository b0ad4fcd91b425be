"""Packed forms of weights, kept as long as the weight lives.

A packed form is used only while the weight's shape, strides and dtype, and a 64-bit hash of all of
its bytes taken at that very call, are those of the weight that it was packed from. So no writer can
be missed: not `weight.data`, a NumPy view, another process, nor torch's fused optimizers, which
raise no version counter. The hash reads the weight once, at the bandwidth of the cache or memory it
lies in, 2 to 3 times less than packing moves. Where weights are known to stay for several
calls, as in a loop of decoding, `unchanged()` takes it once; one that this library made and nobody
else holds is sealed, and never hashed; of one that its owner froze, address and version counter
stand for the hash.
"""

import functools
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mbm_kernels._core import native, problem, torch_private

Key = tuple[Any, ...]  # of the owner's id and `pack`, of a view its offset too
_entries: dict[Key, "_Entry"] = {}
_sealed: dict[int, "weakref.ref[Tensor]"] = {}  # by id(tensor)
_frozen: dict[int, "weakref.ref[Tensor]"] = {}  # by id(tensor)
_freezing = 0  # counts what may make a tensor frozen, or no longer
Version = tuple[Any, ...]


class _Trusted(threading.local):
    """The versions that `unchanged` keeps, by id(tensor), each with its tensor."""

    versions: dict[int, tuple[Tensor, Version]] | None = None  # a missing attribute takes 0.5 us


_trusted = _Trusted()


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What CPU tensors held: shapes, strides, dtypes and a hash of every byte; the ISA in use.

    Where all of them are frozen, `hashes` holds addresses and version counters instead.
    """

    kinds: tuple[Any, ...]
    hashes: bytes
    check: Any  # knows tensors of these kinds at once (problem.guard); None where it cannot
    extents: bytes  # in bytes, as the native code takes them
    spans: tuple[tuple[int, int], ...]  # extents and the bytes of an element
    frozen: bool
    freezing: int  # when `frozen` was known

    def same(self, other: "State") -> bool:
        return self is other or (self.hashes == other.hashes and self.kinds == other.kinds)


def state_of(sources: Sequence[Tensor], last: State | None = None) -> State:
    """The state of these tensors, which is `last` itself where nothing has changed since.

    Raises:
        ValueError: the storage of a tensor was freed or is too small for its shape.
    """
    if _trusted.versions is None:
        check = None if last is None else last.check
        known = last is not None and last.freezing == _freezing and len(sources) == len(last.kinds)
        if last is None or check is None or not known or not check(*sources):
            return _made(sources, tuple([_kind(x) for x in sources]), None)
        if last.frozen:
            hashes = _counters(sources)
            if hashes != last.hashes:  # another tensor perhaps, which is not frozen
                return _made(sources, last.kinds, None)
        else:
            hashes = _hashes(sources, last.extents, last.spans)
    else:
        versions = [version_of(x) for x in sources]
        hashes = struct.pack(f"{len(versions)}Q", *(v[1] for v in versions if v is not None))
        hashes += _isa()
        kinds = tuple([v[0] for v in versions if v is not None])
        if last is None or last.kinds != kinds:
            return _made(sources, kinds, hashes)
    return last if hashes == last.hashes else replace(last, hashes=hashes)


def stands_still(sources: Sequence[Tensor], state: State) -> bool:
    """Whether the very tensors that a state is of are frozen, and as they were."""
    frozen = state.frozen and state.freezing == _freezing and _trusted.versions is None
    return frozen and _counters(sources) == state.hashes


def _made(sources: Sequence[Tensor], kinds: tuple[Any, ...], hashes: bytes | None) -> State:
    spans = tuple([(native.extent(x), x.element_size()) for x in sources])
    extents = struct.pack(f"{len(spans)}q", *(span[0] for span in spans))
    freezing, frozen = _freezing, hashes is None and all(_is_frozen(x) for x in sources)
    if hashes is None:
        hashes = _counters(sources) if frozen else _hashes(sources, extents, spans)
    return State(kinds, hashes, problem.guard(sources), extents, spans, frozen, freezing)


def _counters(sources: Sequence[Tensor]) -> bytes:
    """Addresses and version counters, in place of hashes."""
    found = [x.data_ptr() for x in sources]
    found += [x._version for x in sources]
    return struct.pack(f"{len(found)}Q", *found) + _isa()


def _isa() -> bytes:
    """What ends the hashes: a byte that names the ISA in use."""
    found: bytes = native.cpu().fingerprints(b"", [], 1)
    return found


def _hashes(sources: Sequence[Tensor], extents: bytes, spans: tuple[tuple[int, int], ...]) -> bytes:
    addresses = []
    for source, (extent, size) in zip(sources, spans, strict=True):
        if source.untyped_storage().nbytes() < source.storage_offset() * size + extent:
            native.extent(source)  # raises
        addresses.append(source.data_ptr())
    found: bytes = native.cpu().fingerprints(extents, addresses, torch.get_num_threads())
    return found


class _Entry:
    __slots__ = ("kept", "owner", "sealed")

    def __init__(self, owner: "weakref.ref[Tensor]", sealed: bool):
        self.owner, self.sealed = owner, sealed
        # A buffer and the state of what it was packed from: one attribute, for threads share it.
        self.kept: tuple[State, Tensor] | None = None


def packed(
    size: Callable[..., int], pack: Callable[..., None], owner: Tensor, *others: Tensor
) -> Tensor:
    """The packed form of `owner` and `others`, a float32 vector.

    Args:
        size: size(owner, *others), elements of the packed form in the ISA in use.
        pack: pack(out, owner, *others) writes it. The buffer is written again when a weight
            changes, so that training touches no new pages each step, unless a kernel is
            about to read it. One form is kept for each owner and `pack`.
        owner: the weight with whose life the entry ends; of a view of a Parameter it is that
            one's.
        others: further tensors packed with it; an entry made with others is redone.

    Raises:
        ValueError: the storage of a tensor was freed or is too small for its shape.
    """
    sources = (owner, *others)
    key: Key = (id(owner), pack)
    base = torch_private.base(owner)
    if type(base) is Parameter:  # views of one are made anew at each call
        key = (id(base), pack, owner.storage_offset())
        owner = base
    entry = _entries.get(key)
    if entry is None or entry.owner() is not owner:  # an id may be used again
        entry = _new_entry(key, owner)
    kept = entry.kept
    if kept is None:
        return _fill(entry, state_of(sources), size, pack, sources)
    if entry.sealed and not others and kept[0].hashes.endswith(_isa()):
        return kept[1]
    state = state_of(sources, kept[0])
    if state.same(kept[0]):
        if state is not kept[0]:
            entry.kept = (state, kept[1])
        return kept[1]
    del kept
    return _fill(entry, state, size, pack, sources)


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
    return _kind(tensor), native.fingerprint(tensor)


def _kind(tensor: Tensor) -> Version:
    return tensor.shape, tensor.stride(), tensor.dtype


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


def seal(weight: Tensor) -> None:
    """Says that the caller made `weight`, gives it to nobody who writes, and never writes it again.

    What is packed of it alone then needs no hash.
    """
    drop, key = _sealed.pop, id(weight)
    _sealed[key] = weakref.ref(weight, lambda _: drop(key, None))


def freeze(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Says that these tensors of the CPU stay as they are, and returns those that can be frozen.

    The caller answers for it that they are written by nothing that torch does not count, as
    `tensor.data`, a NumPy view or a fused optimizer. What torch counts, and another tensor in the
    place of one, is seen as before. A tensor made in inference mode has no counter, and its
    contents are hashed at each call on.
    """
    global _freezing
    found = [t for t in tensors if t.is_cpu and not t.is_inference()]
    for tensor in found:
        key = id(tensor)
        _frozen[key] = weakref.ref(tensor, functools.partial(_thaw, key))
    _freezing += 1
    return found


def thaw(tensors: Iterable[Tensor]) -> None:
    """Undoes `freeze`."""
    for tensor in tensors:
        if _is_frozen(tensor):
            _thaw(id(tensor))


def _thaw(key: int, _: object = None) -> None:
    """Of a tensor that has died too: another may get its address."""
    global _freezing
    _frozen.pop(key, None)
    _freezing += 1


def _is_frozen(tensor: Tensor) -> bool:
    known = _frozen.get(id(tensor))
    return known is not None and known() is tensor


def _new_entry(key: Key, owner: Tensor) -> _Entry:
    drop = _entries.pop  # bound: at exit a module's names go before its weights
    known = _sealed.get(id(owner))
    sealed = known is not None and known() is owner
    entry = _entries[key] = _Entry(weakref.ref(owner, lambda _: drop(key, None)), sealed)
    return entry


def _held_here() -> int:
    kept = object()
    return sys.getrefcount(kept)


_HELD_HERE = _held_here()  # references to what one local name holds


def _fill(
    entry: _Entry,
    state: State,
    size: Callable[..., int],
    pack: Callable[..., None],
    sources: tuple[Tensor, ...],
) -> Tensor:
    elements = size(*sources)
    kept, entry.kept = entry.kept, None
    fresh = None if kept is None else kept[1]
    del kept
    # Whoever else holds it is about to run a kernel on it, in this thread or another.
    if fresh is None or fresh.numel() != elements or sys.getrefcount(fresh) != _HELD_HERE:
        with torch.inference_mode(False):  # one made in it could not be written outside
            fresh = native.empty((elements,))
    pack(fresh, *sources)
    entry.kept = (state, fresh)
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
    base = torch_private.base(weight)
    owner = base if type(base) is Parameter else weight
    thaw([owner])
    # A copy: another thread may add an entry, and the garbage collector drop one.
    for key in _entries.copy():
        if key[0] == id(owner):
            _entries.pop(key, None)
