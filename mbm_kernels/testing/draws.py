"""What a strategy of drawn inputs draws with, and where the strategies are kept; see cases.py."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Inputs = dict[str, Any]
ROWS, COLUMNS, DEPTH, POSITIONS, CLASSES = 14, 32, 256, 64, 112


class Draws:
    """What a strategy draws with; tensors are float64."""

    def __init__(self, draw: Callable[[Any], Any], large: bool, stratum: str | None = None):
        self.choices: list[Any] = []
        self._draw = draw
        self.large, self.stratum = large, stratum
        self.kept: list[Tensor] = []  # in the layout that they have
        self.generator = torch.Generator().manual_seed(self.between(0, 2**16))
        self.scale = self.of(1.0, 1.0, 0.1, 1e-3, 3.0)

    def draw(self, strategy: Any) -> Any:
        self.choices.append(self._draw(strategy))
        return self.choices[-1]

    def of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def between(self, least: int, most: int) -> int:
        return int(self.draw(st.integers(least, most)))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def size(self, tile: int, small: int = 19) -> int:
        """More than `tile`, by up to a half and 8, where the case is large; else 1 to `small`."""
        least, most = (tile + 1, tile + tile // 2 + 8) if self.large else (1, small)
        return self.between(least, most)

    def keep(self, tensor: Tensor) -> Tensor:
        """`tensor`, whose layout is not to be drawn."""
        self.kept.append(tensor)
        return tensor

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, least: int, most: int, *shape: int) -> Tensor:
        """least <= each < most."""
        return torch.randint(least, most, shape, generator=self.generator)

    def lengths(self, batch: int, steps: int) -> Tensor | None:
        return self.integers(0, steps + 1, batch) if self.flag() else None

    def mask(self, *shapes: tuple[int, ...]) -> Tensor | None:
        """None or of one of the shapes; a row of it may hide everything."""
        shape = self.of(None, *shapes)
        return None if shape is None else torch.rand(*shape, generator=self.generator) < 0.7

    def lead(self, rows: int) -> tuple[int, ...]:
        """Leading dimensions with `rows` elements in all."""
        return self.of((rows,), (rows, 1), (1, rows), *([(2, rows // 2)] if rows % 2 == 0 else []))


STRATEGIES: dict[str, Callable[[Draws], Inputs]] = {}


def draws(make: Callable[[Draws], Inputs]) -> Callable[[Draws], Inputs]:
    """Registers the arguments' strategy of the operation of the same name."""
    STRATEGIES[make.__name__] = make
    return make


# By operation, what its drawn cases must hold some of each: names that `Draws.stratum` takes.
STRATA: dict[str, tuple[str, ...]] = {}
