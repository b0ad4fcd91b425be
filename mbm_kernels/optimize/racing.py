"""An optimized model beside itself in PyTorch and in inference engines, in interleaved rounds."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mbm_kernels import engines
from mbm_kernels._core import heap, timing
from mbm_kernels._core.ratios import Ratio, Times, paired_ratio
from mbm_kernels.optimize.beside import Beside, Form
from mbm_kernels.optimize.parity import stock_form

OURS, STOCK, CHANNELS_LAST = "mbm_kernels", "PyTorch", "PyTorch channels_last"
SECONDS = 4.0
MIN_ROUNDS = 7


def beside_engines(model: nn.Module, inputs: tuple[Any, ...]) -> Beside:
    """Times a model in eval mode as `optimize` made it, as PyTorch runs it, and in engines.

    Engines that compile for minutes are left out. All forms run on PyTorch's number of threads.

    Args:
        inputs: what the model is called with, tensors by position.

    Raises:
        TypeError: where an input is no tensor, which an exported model cannot take.
    """
    if not all(isinstance(x, Tensor) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs)
        raise TypeError(
            f"engines: got inputs {kinds}; expected tensors alone; engines run exported models, "
            "which take nothing else"
        )
    stock = stock_form(copy.deepcopy(model)).eval()
    given = engines.Model(stock, inputs)
    truth = given.truth()
    calls = _calls(model, stock, inputs)
    errors = {
        name: engines.relative_error(engines.flat(call()), truth) for name, call in calls.items()
    }
    found = engines.sessions(given, truth, compiled=False)
    errors |= {name: measured.error or 0.0 for name, measured in found.measured.items()}
    versions = dict.fromkeys(calls, torch.__version__) | {OURS: _version()}
    versions |= {name: measured.version for name, measured in found.measured.items()}
    times = timing.interleave(
        calls | found.calls(),
        SECONDS,
        min_rounds=MIN_ROUNDS,
        settle_seconds=timing.SETTLE_SECONDS,
    )
    forms = [_form(name, versions[name], times, errors) for name in times]
    return Beside(
        sorted(forms, key=lambda form: form.ms),
        found.missing,
        torch.get_num_threads(),
        "warm" if heap.is_warm() or "MALLOC_MMAP_MAX_" in os.environ else "default",
    )


def _calls(
    ours: nn.Module, stock: nn.Module, inputs: tuple[Tensor, ...]
) -> dict[str, Callable[[], Any]]:
    """PyTorch's own forms, with the last of them only where there are images, and ours."""

    def call_of(model: nn.Module, given: tuple[Tensor, ...]) -> Callable[[], Any]:
        def infer() -> Any:
            with torch.no_grad():
                return model(*given)

        return infer

    found = {OURS: call_of(ours, inputs), STOCK: call_of(stock, inputs)}
    if any(x.dim() == 4 for x in inputs):
        last = torch.channels_last
        images = tuple(x.contiguous(memory_format=last) if x.dim() == 4 else x for x in inputs)
        model: Any = copy.deepcopy(stock)
        found[CHANNELS_LAST] = call_of(model.to(memory_format=last), images)
    return found


def _form(name: str, version: str, times: dict[str, Times], errors: dict[str, float]) -> Form:
    ratio = Ratio(1.0, 1.0, 1.0) if name == OURS else paired_ratio(times[name], times[OURS])
    return Form(
        name,
        version.partition("-")[0].partition("+")[0],
        float(torch.as_tensor(times[name]).median()) / 1e6,
        ratio.value,
        ratio.low,
        ratio.high,
        errors[name],
        "" if name == OURS else engines.remark(errors[name], errors[OURS]),
    )


def _version() -> str:
    import mbm_kernels

    return mbm_kernels.__version__
