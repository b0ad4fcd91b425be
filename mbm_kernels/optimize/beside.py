"""A whole model's forms beside each other, as a report holds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Form:
    """One way to run the model.

    ms: the median. ratio, low, high: its time over ours, with the 95 % interval. error: of the
    outputs against float64, over the largest value. remark: of an error that is many times ours.
    """

    name: str
    version: str
    ms: float
    ratio: float
    low: float
    high: float
    error: float
    remark: str = ""


@dataclass(frozen=True)
class Beside:
    """The forms, fastest first; `missing`: engines that did not run, and why."""

    forms: list[Form]
    missing: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    heap: str = "default"

    @property
    def title(self) -> str:
        """One line on how it was measured."""
        return f"the whole model, {self.threads} threads, {self.heap} heap"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    columns = ("form", "version", "ms", "its time / ours", "95 %", "error", "")

    def cells(self) -> list[tuple[str, ...]]:
        """Each form's texts in the order of `columns`."""
        return [
            (
                form.name,
                form.version,
                f"{form.ms:.3g}" if form.ms < 100 else f"{form.ms:.0f}",
                f"{form.ratio:.2f}",
                f"{form.low:.2f}-{form.high:.2f}",
                f"{form.error:.1e}",
                form.remark,
            )
            for form in self.forms
        ]
