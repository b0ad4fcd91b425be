"""MNN, for convolutional models, by its Module interface.

Inputs are variables that share nothing with its memory plan: a session of its Interpreter computes
its results over its own inputs, which would have to be copied in again before each run. Results are
made anew in each call, as PyTorch's are, in NCHW: what it does for its own layout is part of a run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbm_kernels.engines.engine import Engine, Session, stdout_into
from mbm_kernels.engines.model import Model

RECURRENT = ("GRU", "LSTM", "RNN")


class MnnSession(Session):
    """A module with its inputs; `runtime` holds its threads."""

    def __init__(self, module: Any, inputs: list[Any], runtime: Any):
        self._module, self._inputs, self._runtime = module, inputs, runtime
        self._last: Any = None
        self.run()

    def run(self) -> object:
        self._last = self._module.forward(self._inputs)
        return self._last

    def outputs(self) -> list[Tensor]:
        return [torch.from_numpy(result.read().copy()) for result in self._last]


class Mnn(Engine):
    name, package, module = "MNN", "MNN", "MNN"

    def refuses(self, model: Model) -> str | None:
        if "Conv" not in model.operators:
            return "it is run on convolutions alone"
        if not all(x.is_floating_point() for x in model.inputs):
            return "it is given floating inputs alone"
        return next((f"its {op} fails" for op in RECURRENT if op in model.operators), None)

    def build(self, model: Model, threads: int) -> Session:
        with tempfile.TemporaryDirectory() as folder, stdout_into(Path(folder) / "said"):
            # Its import and its runtime print what the CPU has.
            from MNN import expr, nn

            # "low" and, where the CPU has bfloat16 or int8, "normal" may compute in those.
            runtime = nn.create_runtime_manager(
                ({"backend": "CPU", "numThread": threads, "precision": "high"},)
            )
            path = str(_converted(model, Path(folder)))
            module = nn.load_module_from_file(path, *model.names, runtime_manager=runtime)
            inputs = [expr.const(x.numpy(), list(x.shape), expr.NCHW) for x in model.contiguous]
            return MnnSession(module, inputs, runtime)


# Not by `python -m MNN.tools.mnnconvert`: importing that installs a logging service's package by
# pip, and reports to it. The module of native code that it calls does neither.
CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def _converted(model: Model, folder: Path) -> Path:
    """MNN's form of the model, by its converter, in a process of its own since it may exit.

    Raises:
        RuntimeError: with the converter's last word, where there is none.
    """
    source, target = folder / "model.onnx", folder / "model.mnn"
    source.write_bytes(model.onnx)
    command = [sys.executable, "-c", CONVERT, "-f", "ONNX", "--bizCode", "none"]
    command += ["--modelFile", str(source), "--MNNModel", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not target.exists():
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RuntimeError(f"mnnconvert: {said[-1] if said else f'status {done.returncode}'}")
    return target
