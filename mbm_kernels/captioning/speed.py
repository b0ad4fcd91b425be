"""One training step and one captioning pass, this package's layers against stock PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mbm_kernels._core.timing import interleave
from mbm_kernels.bench.statistics import Summary, paired_ratio
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, collate
from mbm_kernels.captioning.distill import CrossEntropyObjective
from mbm_kernels.captioning.kinds import CAPTIONER
from mbm_kernels.models import Captioner

Call = Callable[[], Any]
LOSS_TOLERANCE = 1e-4  # relative: two float32 evaluations of the same loss
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


def rebuilt(model: Captioner, layers: str) -> Captioner:
    """The same model with the same weights out of other layers."""
    other: Captioner = CAPTIONER.build(layers=layers, **model.settings)
    other.load_state_dict(model.state_dict())
    return other


def training_step(
    model: Captioner, batch: tuple[torch.Tensor, torch.Tensor], compiled: bool
) -> Call:
    """A step as `fit` takes it; the call returns the loss before the update."""
    images, tokens = batch
    objective = CrossEntropyObjective(model.train()).train()
    forward = torch.compile(objective) if compiled else objective
    parameters = list(model.parameters())
    # A rate of 0 leaves the weights, hence the work, the same at every repetition.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

    def step() -> float:
        loss = forward(images, tokens).total
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def captioning_pass(
    model: Captioner, images: torch.Tensor, max_length: int, compiled: bool
) -> Callable[[], list[list[int]]]:
    """Greedy captions of a batch; compiled, the encoder and the step are."""
    model.eval()
    if compiled:
        # Attributes of the instance hide the methods of the class.
        model.encode = torch.compile(model.encode)  # type: ignore[method-assign]
        model.step = torch.compile(model.step)  # type: ignore[method-assign]
    return lambda: model.generate(images, max_length)


def measure(
    model: Captioner,
    captions: CaptionSet,
    tokenizer: WordTokenizer,
    *,
    name: str,
    batch_size: int,
    max_length: int,
    seconds: float,
    compiled: bool = True,
) -> list[Speed]:
    """Both rows for one trained model.

    Args:
        model: gives settings and weights.
        captions: the first `batch_size` images are used.
        name: of the model, for the rows.
        seconds: about how long each row is sampled.
        compiled: also time torch.compile of the stock model.

    Raises:
        ValueError: when the two models disagree; no speed is reported for a wrong result.
    """
    images, tokens, _ = collate(captions, range(min(batch_size, len(captions))), tokenizer)
    forms = {"eager": False} | ({"torch.compile": True} if compiled else {})

    steps = {
        form: training_step(rebuilt(model, "stock"), (images, tokens), is_compiled)
        for form, is_compiled in forms.items()
    }
    ours = training_step(rebuilt(model, "mbm"), (images, tokens), False)
    loss: float = ours()
    for form, step in steps.items():
        other: float = step()
        if not abs(loss - other) <= LOSS_TOLERANCE * abs(other):
            raise ValueError(
                f"speed: training step: got loss {loss}, expected {other} as {form}; "
                "no speed is reported for a wrong result"
            )
    rows = [compare(f"training step, {name}, B{len(images)}", ours, steps, seconds)]

    passes: dict[str, Call] = {
        form: captioning_pass(rebuilt(model, "stock"), images, max_length, is_compiled)
        for form, is_compiled in forms.items()
    }
    caption = captioning_pass(rebuilt(model, "mbm"), images, max_length, False)
    words = caption()
    for form, other_pass in passes.items():
        same = sum(a == b for a, b in zip(words, other_pass(), strict=True)) / len(words)
        if same < SAME_WORDS:
            raise ValueError(
                f"speed: captioning: got {same:.1%} of the captions of {form}, expected "
                f"{SAME_WORDS:.0%}; no speed is reported for a wrong result"
            )
    rows.append(compare(f"captioning, {name}, B{len(images)}", caption, passes, seconds))
    return rows


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
