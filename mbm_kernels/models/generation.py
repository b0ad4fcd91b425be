"""Greedy and beam search, and drawing (sampling.py), over a decoder's words (decoding.py).

A step of search is a function of tensors alone: what it carries to the next step and what it leaves
behind. Nothing is read on the host, so that a loop of steps can be recorded once and run again
(decode_graph.py). Hypotheses are not copied as they grow: each step leaves its words and their
parents, and the best hypothesis is read backwards at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mbm_kernels._core import packing
from mbm_kernels.models import decode_graph
from mbm_kernels.models.decoding import decoder_for
from mbm_kernels.models.sampling import Sample, Sampling
from mbm_kernels.models.search_state import (
    Carry,
    Decoder,
    EncodedImages,
    Search,
    StepModel,
    Trace,
    stacked,
)
from mbm_kernels.ops.linear_topk import beams


class Greedy:
    """The likeliest word at each step, the lowest id of a tie; NaN counts as the largest."""

    beam = 1

    def __init__(self, model: StepModel) -> None:
        self.eos_id = model.eos_id

    def step(self, decoder: Decoder, carry: Carry) -> tuple[Carry, Trace]:
        found = decoder(carry.last, carry.state, 1)
        last = found.ids[..., 0].masked_fill(carry.done, self.eos_id)
        carry = carry._replace(last=last, done=last == self.eos_id, state=found.state)
        # One hypothesis is its own parent; `length` is 0 from the first step to the last.
        return carry, Trace(last, carry.length, found.weights)


class Beam:
    """The hypotheses of highest log-probability per token, their ``eos_id`` included.

    The best `beam` continuations of all hypotheses of an image are among the best `beam` of each.
    """

    def __init__(self, model: StepModel, beam: int) -> None:
        self.beam, self.eos_id = beam, model.eos_id
        self.classes, self.stock = model.vocab_size, model.layers == "stock"
        self.continuations = min(beam, self.classes)

    def step(self, decoder: Decoder, carry: Carry) -> tuple[Carry, Trace]:
        found = decoder(carry.last, carry.state, self.continuations)
        before = (carry.done, carry.length, carry.score)
        words = (found.values, found.ids, found.state, self.eos_id)
        if self.stock:
            *kept, parent = beams.by_topk(before, *words)
        else:
            *kept, parent = beams.select(before, *words, self.classes)
        return Carry(*kept), Trace(kept[0], parent, found.weights)


def start(model: StepModel, encoded: EncodedImages, beam: int) -> Carry:
    state = encoded.state
    shape = (state.shape[0], beam)
    # All hypotheses begin equal: only the first may be extended at the first step.
    dtype = torch.promote_types(state.dtype, torch.float32)
    score = state.new_full(shape, -torch.inf, dtype=dtype)
    score[:, 0] = 0.0
    return Carry(
        state.new_full(shape, model.bos_id, dtype=torch.int64),
        state.new_zeros(shape, dtype=torch.bool),
        state.new_zeros(shape, dtype=torch.int64),
        score,
        state.unsqueeze(1).expand(-1, beam, -1),
    )


def search(
    model: StepModel,
    encoded: EncodedImages,
    max_length: int,
    beam: int,
    want_weights: bool,
    recorded: bool | None = None,
    sampling: Sampling | None = None,
) -> tuple[list[list[int]], list[Tensor]]:
    """Captions of at most `max_length` words, and their weights if wanted.

    `recorded`: whether the loop is a CUDA graph; None where `decode_graph.why_not` has no reason.
    One that draws is none, since its numbers are no part of what is copied in.
    """
    if not encoded.state.shape[0]:
        return [], []
    how: Search = Greedy(model) if beam == 1 else Beam(model, beam)
    if sampling is not None:
        numbers = sampling.numbers(encoded.state.shape[0], max_length)
        how, recorded = Sample(model, sampling, numbers.to(encoded.state.device)), False
    decoder, carry = decoder_for(model, encoded), start(model, encoded, beam)
    if recorded is None:
        recorded = decode_graph.why_not(model, encoded.state.device) is None
    if recorded:
        carry, trace = decode_graph.run(model, how, decoder, carry, max_length)
    else:
        with packing.unchanged():  # each weight is hashed once for all steps
            carry, trace = loop(how, decoder.for_steps(), carry, max_length)
    words, weights = _best(carry, trace, want_weights)
    ends = [row.index(model.eos_id) if model.eos_id in row else len(row) for row in words]
    captions = [row[:end] for row, end in zip(words, ends, strict=True)]
    return captions, [row[:end] for row, end in zip(weights, ends, strict=False)]


def loop(how: Search, decoder: Decoder, carry: Carry, max_length: int) -> tuple[Carry, Trace]:
    """Step by step; stops where every hypothesis of every image has ended."""
    traces = []
    for _ in range(max_length):
        carry, trace = how.step(decoder, carry)
        traces.append(trace)
        if bool(carry.done.all()):
            break
    return carry, stacked(traces)


def _best(carry: Carry, trace: Trace, want_weights: bool) -> tuple[list[list[int]], list[Tensor]]:
    """Words of each image's best hypothesis and, if wanted, its weights [T, S] by image."""
    words, parents = trace.words.cpu(), trace.parents.cpu()  # [T, B, K]
    # The one hypothesis of a greedy search or of a drawing is the best.
    at = (carry.score / carry.length).argmax(dim=1, keepdim=True).cpu()  # [B, 1]
    path = [at]  # backwards, and from the parent of the first word
    for step in range(len(words) - 1, -1, -1):
        path.append(parents[step].gather(1, path[-1]))
    path = path[::-1]
    rows = words.gather(2, torch.stack(path[1:]))[..., 0].t().tolist()
    if not want_weights:
        return rows, []
    # A parent's attention chose the word.
    index = torch.stack(path[:-1]).to(trace.weights.device)[..., None]
    index = index.expand(-1, -1, -1, trace.weights.shape[-1])  # [T, B, 1, S]
    return rows, list(trace.weights.gather(2, index)[:, :, 0].unbind(1))
