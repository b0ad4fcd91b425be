"""`check_parity`: a model beside itself of stock modules, and both in float64."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from mbm_kernels.nn import counterparts
from mbm_kernels.optimize import errors, outputs
from mbm_kernels.optimize.errors import Parity
from mbm_kernels.optimize.fused import PLAN, Fused
from mbm_kernels.optimize.optimizing import optimize


def check_parity(model: nn.Module, *inputs: Any, backward: bool = True) -> Parity:
    """The errors of an optimized model beside those of the same model of stock modules.

    Three copies of the model run: as it is, of stock modules, and of stock modules in float64; the
    model itself is not called. Dropout is off in all of them. A model without modules of ours is
    compared as `optimize` makes it by its defaults.

    Args:
        model: the model, in its mode; a whole one is judged better in eval mode, where a
            BatchNorm's statistics are no further source of errors.
        inputs: what it is called with; gradients are checked of those that require them.
        backward: whether to compare gradients, of parameters and inputs, too.

    Returns:
        Parity: `.ok`, `.rows`, and `str()`, a table.
    """
    ours = errors.without_dropout(copy.deepcopy(model))
    stock = stock_form(copy.deepcopy(ours))
    if all(type(m) is type(s) for m, s in zip(ours.modules(), stock.modules(), strict=True)):
        optimize(ours, mode="training" if ours.training else "inference")
    truth = copy.deepcopy(stock).double()
    for module in ours.modules():
        if isinstance(module, Fused):
            vars(module)[PLAN].checked = True  # else the first call answers as written

    def values(form: nn.Module, args: tuple[Any, ...], by_torch: bool) -> errors.Values:
        parameters = dict(form.named_parameters())
        return errors.values(form, args, {}, parameters, backward, disabled=by_torch)

    return errors.compare(
        values(ours, outputs.detached(inputs), False),
        values(stock, outputs.detached(inputs), True),
        values(truth, outputs.in_float64(inputs), True),
        winograd=any(isinstance(m, nn.Conv2d) for m in ours.modules()),
    )


def stock_form(model: nn.Module) -> nn.Module:
    """The model, in place, with what `optimize` changed, or could have, made torch's again."""
    for module in model.modules():
        known = counterparts.of(module)
        if isinstance(module, Fused):
            module.unfuse()
        elif known is not None and type(module) is known.ours:
            counterparts.restore(module)
    return model
