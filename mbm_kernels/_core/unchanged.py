"""Whether modules are as they were: what a call relies on that its tensors do not tell.

A `Watch` is told what it relies on and compares that by identity in one native call. It sees every
change that is made by setting or deleting an attribute or an item of a dictionary; another value in
a place that it watches is a change even where both are equal.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from mbm_kernels._core import native

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MISSING = object()


class Watch:
    """Parts of modules and dictionaries, and what they were when they were added."""

    __slots__ = ("_held", "_native")

    def __init__(self) -> None:
        self._native = native.cpu().Unchanged()
        self._held: list[Any] = []  # which the native part borrows

    def same(self) -> bool:
        found: bool = self._native.check()
        return found

    def module(self, module: nn.Module, *names: str) -> None:
        """A module's class, that its instance has no forward and no hooks, and attributes of it."""
        self._add("type", module, None, type(module))
        self.attributes(module, "forward", *names)
        for name in HOOKS:
            self._add("empty", module, name, None)

    def attributes(self, owner: Any, *names: str) -> None:
        """What stands on an instance itself by these names, nothing included."""
        for name in names:
            self._add("attribute", owner, name, vars(owner).get(name, _MISSING))

    def items(self, owner: dict[str, Any], keys: Iterable[str]) -> None:
        """What a dictionary has by these keys, nothing included."""
        for key in keys:
            self._add("item", owner, key, owner.get(key, _MISSING))

    def size(self, owner: dict[str, Any]) -> None:
        """How many items a dictionary has."""
        self._held.append(owner)
        self._native.add("size", owner, None, None, False, len(owner))

    def _add(self, look: str, owner: Any, key: str | None, expected: Any) -> None:
        absent = expected is _MISSING
        self._held += (owner, key, expected)
        self._native.add(look, owner, key, None if absent else expected, absent, 0)
