"""Words drawn from their probabilities instead of searched for.

B batch, V vocabulary, T the most words of a caption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels.models.search_state import Carry, Decoder, StepModel, Trace

NAME = "Sampling"


@dataclass(frozen=True)
class Sampling:
    """How the words of a caption are drawn.

    temperature: divides the logits; below 1 the likely words become likelier. top_k: only so many
    of the likeliest words, 0 for all. top_p: of these the fewest likeliest whose probabilities sum
    to it. seed: of the numbers drawn. first: the index of a call's first image; image i of a call
    draws the numbers of (seed, first + i), whatever other images are in the call.

    Raises:
        ValueError, TypeError: a value of the wrong kind or outside its bounds.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            checks.number(NAME, name, getattr(self, name))
        for name in ("top_k", "seed", "first"):
            checks.index(NAME, name, getattr(self, name))
            if getattr(self, name) < 0:
                checks.fail(NAME, name, getattr(self, name), "0 or more", "leave it out for 0")
        if not 0 < self.temperature < math.inf:
            expected = "more than 0, and finite"
            checks.fail(NAME, "temperature", self.temperature, expected, "search greedily for 0")
        if not 0 < self.top_p <= 1:
            checks.fail(NAME, "top_p", self.top_p, "more than 0 and up to 1", "1 keeps all words")

    def after(self, images: int) -> Sampling:
        """For the images that follow so many others."""
        return replace(self, first=self.first + images)

    def numbers(self, batch: int, steps: int) -> Tensor:
        """Uniform float64 [B, T] in [0, 1), a row of its own for each image."""
        generator, rows = torch.Generator(), []
        for image in range(self.first, self.first + batch):
            generator.manual_seed((self.seed * 1_000_003 + image) % 2**63)
            rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
        return torch.stack(rows)


class Sample:
    """One hypothesis, whose words are drawn; `length` counts the steps."""

    beam = 1

    def __init__(self, model: StepModel, how: Sampling, numbers: Tensor) -> None:
        self.eos_id, self.how, self.numbers = model.eos_id, how, numbers
        self.classes = min(how.top_k or model.vocab_size, model.vocab_size)

    def step(self, decoder: Decoder, carry: Carry) -> tuple[Carry, Trace]:
        found = decoder(carry.last, carry.state, self.classes)
        chosen = choose(found.values, self.numbers.gather(1, carry.length), self.how)
        drawn = found.ids.gather(-1, chosen[..., None])[..., 0]
        last = drawn.masked_fill(carry.done, self.eos_id)
        parents = torch.zeros_like(carry.length)
        carry = carry._replace(
            last=last, done=last == self.eos_id, state=found.state, length=carry.length + 1
        )
        return carry, Trace(last, parents, found.weights)


def choose(values: Tensor, numbers: Tensor, how: Sampling) -> Tensor:
    """The place, int64 [...], where each of `numbers` [...] in [0, 1) falls among the words.

    Args:
        values: log-probabilities [..., k], descending.
    """
    shares = torch.softmax(values.double() / how.temperature, dim=-1)
    # A word stays while those before it sum to less than top_p: the first always does.
    kept = shares.cumsum(-1) - shares < how.top_p
    reached = (shares * kept).cumsum(-1)
    place = (reached <= numbers[..., None] * reached[..., -1:]).sum(-1)
    return torch.minimum(place, kept.sum(-1) - 1)
