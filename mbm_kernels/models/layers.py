"""One table per kind of layer, so that a model is written once and built from ours or stock's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mbm_kernels.models import stock_layers
from mbm_kernels.ops.gru.op import gru as gru_op


@dataclass(frozen=True)
class Layers:
    """Factories of modules and the functions that decoding calls step by step."""

    conv_bias_act: Callable[..., nn.Module]
    linear: Callable[..., nn.Linear]
    concat_linear: Callable[..., nn.Module]
    gru: Callable[..., nn.GRU]
    additive_attention: Callable[..., nn.Module]
    gru_cell: Callable[..., Any]
    attend_additive: Callable[..., Any]
    attend_dot: Callable[..., Any]
    last_state: Callable[..., Tensor]
    join: Callable[..., Tensor]
    contrastive_loss: Callable[..., Tensor]


STOCK = Layers(
    conv_bias_act=stock_layers.ConvBiasAct,
    linear=nn.Linear,
    concat_linear=stock_layers.ConcatLinear,
    gru=nn.GRU,
    additive_attention=stock_layers.AdditiveAttention,
    gru_cell=stock_layers.gru_cell,
    attend_additive=stock_layers.additive_attention,
    attend_dot=stock_layers.cross_attention,
    last_state=stock_layers.last_state,
    join=stock_layers.concat_linear,
    contrastive_loss=stock_layers.contrastive_loss,
)


def layers_named(name: str) -> Layers:
    """The table for ``"mbm"`` or ``"stock"``.

    Raises:
        ValueError: for any other name.
    """
    if name == "stock":
        return STOCK
    if name == "mbm":
        import mbm_kernels
        from mbm_kernels import nn as fused
        from mbm_kernels.ops.concat_linear.module import Linear

        return Layers(
            conv_bias_act=fused.ConvBiasAct,
            linear=Linear,
            concat_linear=fused.ConcatLinear,
            gru=fused.GRU,
            additive_attention=fused.AdditiveAttention,
            gru_cell=mbm_kernels.gru_cell,
            attend_additive=mbm_kernels.additive_attention,
            attend_dot=mbm_kernels.cross_attention,
            last_state=_last_state,
            join=mbm_kernels.concat_linear,
            contrastive_loss=mbm_kernels.contrastive_loss,
        )
    raise ValueError(f"layers: got {name!r}, expected 'mbm' or 'stock'")


def _last_state(gru: Any, x: Tensor, lengths: Tensor | None) -> Tensor:
    """As stock_layers.last_state; no step past a row's length is taken."""
    weights = gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0
    steps = x.transpose(0, 1)
    return gru_op(steps, None, *weights, lengths=lengths, backend=gru.backend)[1]
