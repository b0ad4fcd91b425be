"""Greedy and beam search over a captioner's step.

K hypotheses of one picture are K queries over the same keys, so nothing of the picture is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mbm_kernels.models.captioner import Captioner, EncodedImages

Captions = tuple[list[list[int]], list[Tensor]]


def _trim(tokens: Tensor, weights: Tensor, eos_id: int) -> Captions:
    """Rows of tokens [B, L] and weights [B, L, S] up to, and without, the first ``eos_id``."""
    captions, kept = [], []
    for row, attention in zip(tokens.tolist(), weights, strict=True):
        length = row.index(eos_id) if eos_id in row else len(row)
        captions.append(row[:length])
        kept.append(attention[:length])
    return captions, kept


def greedy_search(model: Captioner, encoded: EncodedImages, max_length: int) -> Captions:
    """The likeliest word at each step; torch.argmax gives the lowest id of a tie."""
    batch, places = encoded.features.shape[:2]
    state = encoded.state.unsqueeze(1)
    last = torch.full((batch, 1), model.bos_id, device=state.device)
    done = torch.zeros_like(last, dtype=torch.bool)
    words, maps = [], []
    for _ in range(max_length):
        logits, state, weights = model.step(encoded, last, state)
        last = logits.argmax(dim=-1).masked_fill(done, model.eos_id)
        words.append(last)
        maps.append(weights)
        done = done | (last == model.eos_id)
        if bool(done.all()):
            break
    if not batch:
        return [], []
    tokens, attention = torch.cat(words, dim=1), torch.cat(maps, dim=1)
    return _trim(tokens, attention.reshape(batch, -1, places), model.eos_id)


def beam_search(model: Captioner, encoded: EncodedImages, max_length: int, beam: int) -> Captions:
    """The hypothesis of highest log-probability per token, its ``eos_id`` included."""
    batch, places = encoded.features.shape[:2]
    if not batch:
        return [], []
    device, vocab = encoded.state.device, model.vocab_size
    state = encoded.state.unsqueeze(1).expand(-1, beam, -1)
    last = torch.full((batch, beam), model.bos_id, device=device)
    done = torch.zeros_like(last, dtype=torch.bool)
    length = torch.zeros_like(last)
    # All hypotheses begin equal: only the first may be extended at the first step.
    score = encoded.state.new_full((batch, beam), -torch.inf)
    score[:, 0] = 0.0
    tokens = torch.empty(batch, beam, 0, dtype=torch.int64, device=device)
    attention = encoded.state.new_empty(batch, beam, 0, places)
    ended = encoded.state.new_full((vocab,), -torch.inf)
    ended[model.eos_id] = 0.0  # a finished hypothesis has one continuation, itself

    for _ in range(max_length):
        logits, state, weights = model.step(encoded, last, state)
        gain = torch.where(done[..., None], ended, logits.log_softmax(dim=-1))
        total = score[..., None] + gain  # [B, K, V]
        lengths = length + (~done).to(length.dtype)
        ranked = (total / lengths[..., None]).flatten(1)
        order = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :beam]
        parent, last = order // vocab, order % vocab

        score = total.flatten(1).gather(1, order)
        length = lengths.gather(1, parent)
        state = _pick(state, parent)
        tokens = torch.cat([_pick(tokens, parent), last[..., None]], dim=2)
        attention = torch.cat(
            [_pick(attention, parent), _pick(weights, parent).unsqueeze(2)], dim=2
        )
        done = done.gather(1, parent) | (last == model.eos_id)
        if bool(done.all()):
            break
    best = (score / length).argmax(dim=1, keepdim=True)
    return _trim(_pick(tokens, best)[:, 0], _pick(attention, best)[:, 0], model.eos_id)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, J] of x [B, K, ...] along its second dimension."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
