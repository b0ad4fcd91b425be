"""A model of this package's layers timed against the same of stock PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from mbm_kernels._core.timing import interleave
from mbm_kernels.bench.statistics import Summary, paired_ratio
from mbm_kernels.demo.subjects import Call, Subject

LOSS_TOLERANCE = 1e-4  # relative: two float32 evaluations of the same loss
VALUE_TOLERANCE = 1e-3  # of the largest: of embeddings and logits after several layers
SAME_WORDS = 0.99  # share of captions; a word may flip where two logits are equal but for rounding


@dataclass(frozen=True)
class Speed:
    """A row of the demo's table; ratio = stock_ms / mbm_ms with its bootstrap 95 % interval.

    `forms` holds the median milliseconds of every stock form; `stock_form` names the fastest.
    """

    what: str
    stock_form: str
    mbm_ms: float
    stock_ms: float
    ratio: float
    ratio_lo: float
    ratio_hi: float
    forms: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(subject: Subject, *, seconds: float, compiled: bool = True) -> list[Speed]:
    """The rows of one model: a training step, and what it is used for.

    Args:
        seconds: about how long each row is sampled.
        compiled: also time torch.compile of the stock model.

    Raises:
        ValueError: when the two models disagree; no speed is reported for a wrong result.
    """
    rows = []
    for what, make in (
        ("training step", subject.training_step),
        (subject.use, subject.inference),
    ):
        title = f"{what}, {subject.name}, B{len(subject.images)}"
        rows.append(_row(title, make, seconds, compiled))
    return rows


def _row(what: str, make: Callable[[str, bool], Call], seconds: float, compiled: bool) -> Speed:
    forms = {"eager": False} | ({"torch.compile": True} if compiled else {})
    stock = {form: make("stock", is_compiled) for form, is_compiled in forms.items()}
    ours = make("mbm", False)
    found = ours()
    for form, call in stock.items():
        _check_same(what, form, found, call())
    return compare(what, ours, stock, seconds)


def _check_same(what: str, form: str, found: Any, expected: Any) -> None:
    """Of losses, tensors, or captions as token ids."""
    if isinstance(found, Tensor):
        error = float((found - expected).abs().max() / expected.abs().max())
        same, got = error <= VALUE_TOLERANCE, f"values that differ by {error:.1e} of the largest"
        wanted = f"at most {VALUE_TOLERANCE:.0e}"
    elif isinstance(found, list):
        share = sum(a == b for a, b in zip(found, expected, strict=True)) / len(found)
        same, got, wanted = share >= SAME_WORDS, f"{share:.1%} of the captions", f"{SAME_WORDS:.0%}"
    else:
        same = abs(found - expected) <= LOSS_TOLERANCE * abs(expected)
        got, wanted = f"loss {found}", str(expected)
    if not same:
        raise ValueError(
            f"speed: {what}: got {got}, expected {wanted} as {form}; no speed is reported for a "
            "wrong result"
        )


def compare(what: str, ours: Call, stock: dict[str, Call], seconds: float) -> Speed:
    """Times all forms in the same rounds; the stock form of the smallest median is compared."""
    times = interleave({"mbm": ours, **stock}, seconds)
    medians = {form: Summary.of(times[form]).median_ms for form in times}
    best = min(stock, key=lambda form: medians[form])
    ratio = paired_ratio(times[best], times["mbm"])
    return Speed(
        what,
        best,
        medians["mbm"],
        medians[best],
        ratio.value,
        ratio.low,
        ratio.high,
        {form: medians[form] for form in stock},
    )
