"""What the models' configurations share: checks of their fields, and their form in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Self

from mbm_kernels._core import checks
from mbm_kernels.models.image_encoder import MOST_SIDE, STRIDE

MOST_WIDTH = 1 << 16


class Config:
    """Base of the frozen dataclasses that describe a model."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: lists in place of tuples."""
        found: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `as_dict` gave; a field that is absent has its default.

        Raises:
            ValueError, TypeError: a field that is unknown or has an impossible value.
        """
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                checks.fail(cls.__name__, name, "no field", f"one of {known}", "check the spelling")
        return cls(**values)

    def whole(self, *names: str, least: int = 1, most: int = MOST_WIDTH) -> None:
        """Each of the fields is an int within the bounds."""
        for name in names:
            value = getattr(self, name)
            checks.index(type(self).__name__, name, value)
            if not least <= value <= most:
                self.fail(name, value, f"{least} to {most}", "take a size within it")

    def widths(self, name: str, count: int) -> None:
        """The field is `count` positive ints; a list becomes a tuple."""
        found = self._sequence(name)
        good = all(type(x) is int and 1 <= x <= MOST_WIDTH for x in found)
        if len(found) != count or not good:
            expected = f"{count} ints from 1 to {MOST_WIDTH}"
            self.fail(name, list(found), expected, "give one for each convolution")

    def choices(self, name: str, known: Sequence[str]) -> None:
        """The field is one or more of `known`, each once; a list becomes a tuple."""
        found = self._sequence(name)
        if not found or len(set(found)) != len(found) or any(x not in known for x in found):
            expected = f"one or more of {list(known)}, each once"
            self.fail(name, list(found), expected, "check the spelling")

    def image_side(self, name: str) -> None:
        self.whole(name, least=STRIDE, most=MOST_SIDE)
        if getattr(self, name) % STRIDE:
            self.fail(name, getattr(self, name), f"a multiple of {STRIDE}", "round it")

    def fail(self, name: str, got: object, expected: str, remedy: str) -> None:
        checks.fail(type(self).__name__, name, got, expected, remedy)

    def _sequence(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if isinstance(value, str) or not isinstance(value, Sequence):
            op, got = type(self).__name__, checks.describe(value)
            checks.fail(op, name, got, "a sequence", "wrap it in a tuple", TypeError)
        found = tuple(value)
        object.__setattr__(self, name, found)
        return found
