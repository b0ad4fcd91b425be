"""Packed forms of weights, kept as long as the weight lives and redone when it changes.

A change is seen by the version counter that torch raises at every in-place write (optimizers,
`copy_`, `load_state_dict`), or by a new address. Writing through `weight.data` or a NumPy view
raises no counter: call `forget(weight)` after such a write.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native

_entries: dict[tuple[int, str], "_Entry"] = {}


class _Entry:
    __slots__ = ("buffer", "owner", "state")

    def __init__(self, owner: "weakref.ref[Tensor]"):
        self.owner = owner
        self.state: tuple[Any, ...] | None = None
        self.buffer: Tensor | None = None


def packed(
    kind: str,
    owner: Tensor,
    others: tuple[Tensor | None, ...],
    size: Callable[[], int],
    pack: Callable[[Tensor], None],
) -> Tensor:
    """The packed form of `owner` and `others`, a float32 vector.

    Args:
        kind: names the layout; one entry is kept for each owner and kind.
        owner: the weight with whose life the entry ends.
        others: further tensors packed with it; an entry made with others is redone.
        size: elements of the packed form in the ISA in use.
        pack: writes it; a buffer may be written again when the weight changes, so that training
            touches no new pages each step.
    """
    if owner.is_inference() or any(t is not None and t.is_inference() for t in others):
        unkept = torch.empty(size())  # inference tensors count no versions
        pack(unkept)
        return unkept
    state = (
        native.cpu().isa(),
        owner.data_ptr(),
        owner._version,
        *[None if t is None else (t.data_ptr(), t._version) for t in others],
    )
    key = (id(owner), kind)
    entry = _entries.get(key)
    if entry is None or entry.owner() is not owner:  # an id may be used again
        entry = _entries[key] = _Entry(weakref.ref(owner, lambda _: _entries.pop(key, None)))
    if entry.buffer is not None and entry.state == state:
        return entry.buffer
    elements = size()
    kept = entry.buffer
    fresh = kept if kept is not None and kept.numel() == elements else torch.empty(elements)
    entry.state = None
    pack(fresh)
    entry.buffer, entry.state = fresh, state
    return fresh


def forget(weight: Tensor) -> None:
    """Drops what was packed from `weight`: for writes that its version counter does not see."""
    for key in [k for k in _entries if k[0] == id(weight)]:
        del _entries[key]
