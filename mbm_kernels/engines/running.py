"""Which engines run a model here, built; and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mbm_kernels.engines.engine import Engine, Session
from mbm_kernels.engines.errors import MOST_ERROR, relative_error
from mbm_kernels.engines.inductor import Inductor
from mbm_kernels.engines.mnn import Mnn
from mbm_kernels.engines.model import Model
from mbm_kernels.engines.onnxruntime import OnnxRuntime
from mbm_kernels.engines.openvino import OpenVino
from mbm_kernels.engines.zentorch import ZenTorch

ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (OnnxRuntime(), OpenVino(), Mnn(), Inductor(), ZenTorch())
}


@dataclass(frozen=True)
class Measured:
    """What is said of an engine beside its times: its version and error.

    error: of the outputs against float64, over the largest value; None where nobody took it.
    """

    version: str
    error: float | None = None
    pytorch: bool = False


@dataclass
class Sessions:
    """Engines that run a model, by name, and why the others do not."""

    built: dict[str, Session] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def calls(self) -> dict[str, Callable[[], object]]:
        return {name: session.run for name, session in self.built.items()}


def sessions(
    model: Model,
    truth: Sequence[Tensor] | None = None,
    *,
    compiled: bool = True,
    engines: Sequence[Engine] | None = None,
) -> Sessions:
    """Every engine's session of a model on PyTorch's number of threads, its outputs checked.

    Args:
        truth: the outputs in float64; without them no output is checked.
        compiled: also those that compile, for seconds to minutes a model.
        engines: instead of all of ENGINES.
    """
    found = Sessions()
    for engine in ENGINES.values() if engines is None else engines:
        if (reason := engine.why_not()) is not None:
            found.missing[engine.name] = reason
        elif engine.compiles and not compiled:
            found.missing[engine.name] = "compiling was left out"
        else:
            _build(engine, model, truth, found)
    return found


def _build(engine: Engine, model: Model, truth: Sequence[Tensor] | None, found: Sessions) -> None:
    try:
        if (reason := engine.refuses(model)) is not None:
            found.missing[engine.name] = reason
            return
        session = engine.build(model, torch.get_num_threads())
        error = None if truth is None else relative_error(session.outputs(), truth)
    except Exception as failed:  # each engine and the exporter raise their own kinds
        first = (str(failed).strip().splitlines() or [""])[0]
        found.missing[engine.name] = f"{type(failed).__name__}: {first[:200]}"
        return
    if error is not None and error > MOST_ERROR:
        found.missing[engine.name] = f"its results are off by {error:.1e}: not the same model"
        return
    found.built[engine.name] = session
    found.measured[engine.name] = Measured(engine.version(), error, engine.pytorch)
