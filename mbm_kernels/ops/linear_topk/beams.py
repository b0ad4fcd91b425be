"""What follows linear_topk in a step of beam search: which continuations live on.

B images, K hypotheses of each, k continuations of each of these, H features of a state.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mbm_kernels._core import dispatch
from mbm_kernels._core.tracing import is_plain


class Beams(NamedTuple):
    """Hypotheses [B, K], best first: their last words, whether they have ended, tokens, sums of
    log-probabilities, states [B, K, H], and which hypothesis each extends."""

    last: Tensor
    done: Tensor
    length: Tensor
    score: Tensor
    state: Tensor
    parent: Tensor


def select(
    before: tuple[Tensor, Tensor, Tensor],
    values: Tensor,
    ids: Tensor,
    state: Tensor,
    eos_id: int,
    classes: int,
) -> Beams:
    """The K continuations of highest log-probability per token; of equal ones the earlier.

    One that has ended has one continuation, itself. The order is that of a stable sort of [B, K k],
    largest first: NaN before all else, a tie to the earlier hypothesis and its likelier word.

    Args:
        before: done bool, length int64 and score [B, K], float32 or float64.
        values: log-probabilities [B, K, k], and ids int64, as linear_topk gives them.
        state: [B, K, H], after the step.
        eos_id: the word that ends a hypothesis, and that one that has ended goes on with.
        classes: V, by which linear_topk chooses its backend: this runs on the same.
    """
    pictures, beam, k = values.shape
    sizes = {"R": pictures * beam, "H": state.size(-1), "V": classes, "k": k, "training": 0}
    name = dispatch.select("linear_topk", "auto", values.device, values.dtype, sizes)
    if name == "triton" and is_plain((*before, values, ids, state)):
        run = dispatch.load_backend("linear_topk", name).select
        return Beams(*run(*before, values, ids, state, eos_id))
    return by_torch(before, values, ids, state, eos_id)


def by_torch(
    before: tuple[Tensor, Tensor, Tensor], values: Tensor, ids: Tensor, state: Tensor, eos_id: int
) -> Beams:
    """`select` in plain torch: some twenty launches on a GPU, the definition of the kernel."""
    return _beams(before, values, ids, state, eos_id, _by_sort)


def by_topk(
    before: tuple[Tensor, Tensor, Tensor], values: Tensor, ids: Tensor, state: Tensor, eos_id: int
) -> Beams:
    """The stock form: a third of the time of the sort, and which of equal ones lives on is open."""
    return _beams(before, values, ids, state, eos_id, _by_topk)


def _by_sort(ranked: Tensor, beam: int) -> Tensor:
    return ranked.sort(dim=-1, descending=True, stable=True).indices[:, :beam]


def _by_topk(ranked: Tensor, beam: int) -> Tensor:
    return ranked.topk(beam).indices


def _beams(
    before: tuple[Tensor, Tensor, Tensor],
    values: Tensor,
    ids: Tensor,
    state: Tensor,
    eos_id: int,
    first: Callable[[Tensor, int], Tensor],
) -> Beams:
    """`first`: places of the largest of [B, K k]."""
    done, length, score = before
    beam, k = values.shape[1:]
    over = done[..., None]
    ended = values.new_full((k,), -torch.inf)
    ended[:1] = 0.0
    total = score[..., None] + torch.where(over, ended, values)  # [B, K, k]
    ids = ids.masked_fill(over, eos_id)
    lengths = length + ~done
    ranked = (total / lengths[..., None]).flatten(1)
    order = first(ranked, beam)
    parent = order // k
    last = ids.flatten(1).gather(1, order)
    return Beams(
        last,
        done.gather(1, parent) | (last == eos_id),
        lengths.gather(1, parent),
        total.flatten(1).gather(1, order),
        state[torch.arange(state.size(0), device=state.device)[:, None], parent],
        parent,
    )
