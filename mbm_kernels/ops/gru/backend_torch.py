"""The fastest PyTorch baseline: one aten::gru, packed or masked where rows have lengths."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels._core.problem import derived
from mbm_kernels._core.tracing import in_functorch
from mbm_kernels.ops.gru.problem import Problem
from mbm_kernels.ops.gru_cell.composite import composite

# Packed sequences skip the steps past a row's length, but cost more per step backward: on a CPU
# thread both forms take the same time, forward and backward, where 80 to 90 % of the steps are
# valid (H 128 to 512), or fewer (H 64); forward alone, packed is hardly ever slower.
PACKED_BELOW = 0.75


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(p: Problem, x: Tensor, h0: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, None]:
    *given, lengths, save = rest
    steps, batch, _ = p.x_shape
    if h0 is None:
        h0 = x.new_zeros(p.state_shape)
    weights = [weight for weight in given if weight is not None]
    reverse = p.reverse
    if steps == 0:
        # aten::gru refuses; the product has the right shape and keeps y in the autograd graph.
        return F.linear(x, weights[0][: p.hidden]), h0.clone(), None
    if lengths is not None:
        lengths = lengths.clamp(0, steps)
        if checks.values_readable(lengths):
            valid = int(lengths.sum())
            if valid == steps * batch:
                lengths = None
            elif valid > 0 and (not save or valid < PACKED_BELOW * steps * batch):
                return *_packed(x, h0, weights, lengths, reverse, save), None
    if lengths is not None:
        return *_masked(x, h0, weights, lengths.to(x.device), reverse, save), None
    composed = derived(p, "torch composed", _is_composed)
    y, h_n = _whole(x.flip(0) if reverse else x, h0, weights, save, composed)
    return y.flip(0) if reverse else y, h_n, None


def _is_composed(p: Problem) -> bool:
    """Whether steps are made of differentiable parts: aten::gru has no batching rule. A problem
    that plain calls share is none of functorch's."""
    return in_functorch()


def _whole(
    x: Tensor, h0: Tensor, weights: list[Tensor], save: bool, composed: bool
) -> tuple[Tensor, Tensor]:
    if composed:
        biases = weights[2:] or (None, None)
        outputs = []
        for from_input in F.linear(x, weights[0], biases[0]).unbind(0):
            h0 = composite(from_input, h0, weights[1], biases[1])
            outputs.append(h0)
        return torch.stack(outputs), h0
    y, h_n = torch.gru(x, h0.unsqueeze(0), weights, len(weights) == 4, 1, 0.0, save, False, False)
    return y, h_n.squeeze(0)


def _masked(
    x: Tensor, h0: Tensor, weights: list[Tensor], lengths: Tensor, reverse: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """All steps of all rows; reads no value of the lengths, so that it never waits for a device."""
    time = torch.arange(x.size(0), device=x.device).unsqueeze(1)
    inside = time < lengths  # [T, B]
    outside = ~inside.unsqueeze(2)
    source = torch.where(inside, lengths - 1 - time, time).unsqueeze(2) if reverse else None
    x = x.masked_fill(outside, 0)
    if source is not None:
        x = x.gather(0, source.expand_as(x))
    some = lengths.unsqueeze(1) > 0
    y, _ = _whole(x, h0.masked_fill(~some, 0), weights, save, in_functorch())
    last = (lengths - 1).clamp(min=0)[None, :, None].expand(1, -1, y.size(2))
    h_n = torch.where(some, y.gather(0, last).squeeze(0), h0)
    if source is not None:
        y = y.gather(0, source.expand_as(y))
    return y.masked_fill(outside, 0), h_n


def _packed(
    x: Tensor, h0: Tensor, weights: list[Tensor], lengths: Tensor, reverse: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """The valid steps alone, as PackedSequence lays them out: steps rising, longest row first."""
    steps, batch, features = x.shape
    hidden = h0.size(1)
    falling, order = lengths.sort(descending=True, stable=True)
    inside = torch.arange(steps, device="cpu").unsqueeze(1) < falling  # [T, B]
    batch_sizes = inside.sum(1)
    batch_sizes = batch_sizes[: int(falling[0])]
    time, column = inside.nonzero(as_tuple=True)
    if reverse:
        time = falling[column] - 1 - time
    source = (time * batch + order[column]).to(x.device)
    started = order[: int(inside[0].sum())].to(x.device)  # rows of length 0 rest in h0
    data, states = torch.gru(
        x.reshape(steps * batch, features).index_select(0, source),
        batch_sizes,
        h0.index_select(0, started).unsqueeze(0),
        weights,
        len(weights) == 4,
        1,
        0.0,
        save,
        False,
    )
    y = data.new_zeros(steps * batch, hidden).index_copy(0, source, data)
    return y.view(steps, batch, hidden), h0.index_copy(0, started, states.squeeze(0))
