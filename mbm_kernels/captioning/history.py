"""The losses of a run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class History:
    """Losses by step: means since the row before in ``train``, held-out ones in ``validation``."""

    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)

    def stale(self) -> int:
        """How many validations the lowest loss is ago."""
        losses = [row["loss"] for row in self.validation]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0
