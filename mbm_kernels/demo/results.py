"""What a demo found, for its summary, its report and results.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.fit import History
from mbm_kernels.demo.speed import Speed
from mbm_kernels.retrieval.evaluate import Table
from mbm_kernels.retrieval.matching import Aucs

Scores = dict[str, dict[str, float]]  # split -> metric -> value
MODELS = {"teacher": "teacher", "student": "student", "student_no_distill": "student alone"}


def spread(count: int, most: int) -> range:
    """Up to `most` of `count` rows, evenly spread, so that failures are among what is shown."""
    stride = max(1, count // most)
    return range(0, min(count, most * stride), stride)


@dataclass(frozen=True)
class Query:
    """A caption, and the nearest images by index, each with a caption of its own."""

    text: str
    found: list[tuple[int, str]]


@dataclass
class Demo:
    """Everything that the report shows."""

    data: str
    attention: str
    seed: int
    sets: dict[str, CaptionSet]
    tokenizer: WordTokenizer
    scores: dict[str, Scores] = field(default_factory=dict)
    baselines: dict[str, Scores] = field(default_factory=dict)
    predictions: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    weights: dict[str, list[Tensor]] = field(default_factory=dict)  # of the student, by split
    histories: dict[str, History] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    recalls: Table = field(default_factory=dict)
    queries: dict[str, list[Query]] = field(default_factory=dict)  # by split
    aucs: dict[str, Aucs] = field(default_factory=dict)  # by split
    speed: list[Speed] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def splits(self) -> list[str]:
        return [name for name in self.sets if name != "train"]
