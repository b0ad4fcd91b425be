"""Which backend "auto" takes for a call, by what prediction, and why not the others."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mbm_kernels._core import cost, dispatch, env, timing
from mbm_kernels._core.errors import BackendUnavailableError
from mbm_kernels.nn import counterparts, trial

SECONDS = 0.1  # of measuring one backend in one call


@dataclass(frozen=True)
class Row:
    """One call of an operation, `name` by a module of that path or the operation itself.

    backend: what runs. predicted_ms: by each backend whose time is predicted. why_not: for each
    other backend the reason. sizes: what the choice goes by. measured_ms: if asked for, by each
    backend that runs: of the call of the operation, or of the module that makes it.
    """

    name: str
    op: str
    backend: str
    predicted_ms: dict[str, float]
    why_not: dict[str, str]
    sizes: dict[str, int]
    measured_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; as text it is a table.

    constants: where the predictions' constants come from; None where there are none.
    """

    rows: list[Row] = field(default_factory=list)
    constants: str | None = None
    threads: int = 1

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        measured = any(row.measured_ms for row in self.rows)
        columns = ["call", "backend", "runs", "predicted", *["measured"] * measured, "why not"]
        table = Table(*columns)
        for row in self.rows:
            call = row.name if row.name == row.op else f"{row.name}: {row.op}"
            for backend in sorted(env.BACKENDS, key=lambda b: b != row.backend):
                runs = backend == row.backend
                times = [row.predicted_ms, *[row.measured_ms] * measured]
                table.add_row(
                    call if runs else "",
                    backend,
                    "yes" if runs else "",
                    *(_time(found[backend]) if backend in found else "" for found in times),
                    row.why_not.get(backend, ""),
                )
        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(table)
            console.print(f"{self.threads} threads; constants {self.constants or 'none'}")
        return capture.get().rstrip()


def explain(
    target: str | nn.Module, *inputs: Any, measure: bool = False, **options: Any
) -> Explanation:
    """Which backend a call takes, the predicted times, and why not the others.

    The call is made once, so that its arguments are checked as they would be. A model is called as
    it is, in its mode and with gradients where they are enabled; each module of torch that has a
    counterpart in `mbm_kernels.nn` is explained as if it were that. Its buffers and the random
    generators are put back afterwards; its hooks run.

    Args:
        target: an operation's name, such as "conv_bias_act", a module or a model.
        inputs, options: its arguments; of an operation, `backend` among them.
        measure: also times each call by every backend that runs it, in interleaved rounds, about
            0.2 s each: forward, as the call was made.

    Returns:
        An Explanation: print it, or read its `rows`.

    Raises:
        ValueError: for an unknown operation, and whatever the call itself raises.
        TypeError: where `target` is neither a name nor a module.

    Example:
        print(explain("conv_bias_act", x, weight, stride=2, activation="relu"))
        print(explain(model, images))
        print(explain(model, images, measure=True))
    """
    if isinstance(target, nn.Module):
        rows = _rows_of_model(target, inputs, options, measure)
    elif isinstance(target, str):
        dispatch.check_op(target)
        function = getattr(importlib.import_module(f"mbm_kernels.ops.{target}"), target)
        with dispatch.observed() as seen:
            function(*inputs, **options)
        rows = [row_of(call.op, call) for call in seen]
        if measure:
            forms = _forms_of_op(target, function, inputs, options, seen)
            times = _measured(forms)
            rows = [replace(row, measured_ms=times) if row.op == target else row for row in rows]
    else:
        raise TypeError(
            f"explain: target: got {type(target).__name__}; expected an operation's name or a "
            "torch.nn.Module; pass one of them"
        )
    table = cost.table()
    return Explanation(rows, table.source if table else None, torch.get_num_threads())


def _rows_of_model(
    model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], measure: bool
) -> list[Row]:
    reasons = {name: counterparts.why_not(m) for name, m in counterparts.named(model).items()}
    modules = dict(model.named_modules())
    reserved = counterparts.in_chains(model)  # whose container says what they run
    free = [name for name, reason in reasons.items() if reason is None]
    swapped = [modules[name] for name in free if modules[name] not in reserved]
    watched = {
        name: (module, "forward")
        for name, module in modules.items()
        if not isinstance(module, torch.jit.ScriptModule) and module not in reserved
    }
    rows = []
    with counterparts.swapped(swapped), trial.unchanged(model):
        with trial.recorded(watched, keep=measure) as calls:
            model(*inputs, **options)
        for name, made in calls.items():
            known = counterparts.of(modules[name])
            path = name or type(modules[name]).__name__
            seen = distinct(made)
            times: dict[int, dict[str, float]] = {}
            own: dict[str, float] = {}
            if measure and known is not None and isinstance(modules[name], known.ours):
                times = _measured_calls(known, modules[name], made, seen)
                if made and not seen:
                    own = _measured(_forms_of_module(known, modules[name], made[0]))
            rows += [
                replace(row_of(path, call), measured_ms=times.get(id(call), {})) for call in seen
            ]
            if known is not None and made and not seen:
                reason = reasons[name] or "PyTorch's own forward serves such a call"
                rows.append(Row(path, known.op, "torch", {}, _all_but_torch(reason), {}, own))
    return rows


def _measured_calls(
    known: counterparts.Counterpart,
    module: Any,
    made: list[trial.Call],
    seen: list[dispatch.Observed],
) -> dict[int, dict[str, float]]:
    """Milliseconds by backend for each of the choices, by its identity: those of the module's call
    in which it was made. The choices of one call share its times."""
    found: dict[int, dict[str, float]] = {}
    for call in made:
        here = [id(choice) for choice in call.seen if any(choice is s for s in seen)]
        if here:
            times = _measured(_forms_of_module(known, module, call))
            found |= dict.fromkeys(here, times)
    return found


def _forms_of_module(
    known: counterparts.Counterpart, module: Any, call: trial.Call
) -> dict[str, Callable[[], object]]:
    def stock() -> object:
        return known.stock.forward(module, *call.args, **call.kwargs)

    kernel, _ = counterparts.kernel_of(known.op, counterparts.first_tensor(module))
    if kernel is None:
        return {"torch": stock}

    def ours() -> object:
        before, module.backend = module.backend, kernel
        try:
            return known.ours.forward(module, *call.args, **call.kwargs)
        finally:
            module.backend = before

    return {kernel: ours, "torch": stock}


def _forms_of_op(
    op: str,
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    seen: list[dispatch.Observed],
) -> dict[str, Callable[[], object]]:
    call = next((call for call in seen if call.op == op), None)
    if call is None:
        return {}
    return {
        backend: partial(function, *inputs, **{**options, "backend": backend})
        for backend in env.BACKENDS
        if dispatch.why_not(op, backend, call.device, call.dtype, **call.sizes) is None
    }


def _measured(forms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds a call, medians of interleaved rounds; a backend that refuses has none."""
    able = {}
    for backend, form in forms.items():
        with suppress(BackendUnavailableError):
            form()
            able[backend] = form
    times = timing.interleave(able, SECONDS * len(able)) if able else {}
    return {backend: round(float(np.median(t)) / 1e6, 6) for backend, t in times.items()}


def _all_but_torch(reason: str) -> dict[str, str]:
    return {backend: reason for backend in env.BACKENDS if backend != "torch"}


def distinct(calls: list[trial.Call]) -> list[dispatch.Observed]:
    """The choices made in these calls, each kind of problem once."""
    found: dict[Any, dispatch.Observed] = {}
    for call in calls:
        for seen in call.seen:
            found.setdefault((seen.op, seen.dtype, *seen.sizes.items()), seen)
    return list(found.values())


def row_of(name: str, call: dispatch.Observed) -> Row:
    """What is to be said of one choice."""
    op, chosen = call.op, call.chosen
    predicted = None
    if call.device.type == "cpu" and call.dtype is torch.float32:
        predicted = dispatch.predicted(op, call.sizes)
    times = {} if predicted is None else {"cpu": predicted.cpu_ns, "torch": predicted.torch_ns}
    why_not = {}
    for backend in env.BACKENDS:
        if backend != chosen:
            reason = dispatch.why_not(op, backend, call.device, call.dtype, **call.sizes)
            why_not[backend] = reason or call.reason or _not_chosen(backend, call, predicted)
    rounded = {b: round(t / 1e6, 6) for b, t in times.items()}
    return Row(name, op, chosen, rounded, why_not, call.sizes)


def _not_chosen(backend: str, call: dispatch.Observed, predicted: cost.Predicted | None) -> str:
    if call.asked != "auto" or dispatch.default(call.op) != "auto":
        return "another backend was asked for"
    if backend == "torch":
        return "the kernel is predicted to be faster"
    if call.device.type != "cpu":
        return "no result from this hardware says that it wins"
    if call.dtype is not torch.float32:
        return f"it was measured in float32, not in {str(call.dtype).removeprefix('torch.')}"
    if predicted is None:
        return "no constants for such a problem; measure this machine by: mbm-kernels calibrate"
    gain = predicted.torch_ns / predicted.cpu_ns
    return f"predicted {gain:.2f}x of PyTorch, taken from {predicted.margin:.2f}x"


def _time(milliseconds: float) -> str:
    return f"{milliseconds * 1e3:.1f} us" if milliseconds < 1 else f"{milliseconds:.2f} ms"
