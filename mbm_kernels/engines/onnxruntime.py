"""ONNX Runtime: inputs and outputs are bound to PyTorch's memory; idle threads do not spin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbm_kernels.engines.engine import Engine, Session
from mbm_kernels.engines.model import Model

ERRORS_ONLY = 3  # of log_severity_level


class OnnxRuntimeSession(Session):
    """One session with an IO binding, whose buffers are those of `given` and `outputs`."""

    def __init__(self, session: Any, given: tuple[Tensor, ...]):
        self._session, self._binding = session, session.io_binding()
        self._given = given
        for wanted, x in zip(session.get_inputs(), given, strict=True):
            self._bind(self._binding.bind_input, wanted.name, x)
        names = [output.name for output in session.get_outputs()]
        for name in names:
            self._binding.bind_output(name, "cpu")
        session.run_with_iobinding(self._binding)  # tells the shapes
        self._outputs = [torch.from_numpy(y).clone() for y in self._binding.copy_outputs_to_cpu()]
        self._binding.clear_binding_outputs()
        for name, y in zip(names, self._outputs, strict=True):
            self._bind(self._binding.bind_output, name, y)
        self.run()

    @staticmethod
    def _bind(bind: Any, name: str, tensor: Tensor) -> None:
        dtype = tensor.numpy().dtype.type
        bind(name, "cpu", 0, dtype, list(tensor.shape), tensor.data_ptr())

    def run(self) -> object:
        return self._session.run_with_iobinding(self._binding)

    def outputs(self) -> list[Tensor]:
        return self._outputs


class OnnxRuntime(Engine):
    name = package = module = "onnxruntime"

    def build(self, model: Model, threads: int) -> Session:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = ERRORS_ONLY
        # Its pool would hold a core while the next form is timed.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            model.onnx, options, providers=["CPUExecutionProvider"]
        )
        return OnnxRuntimeSession(session, model.contiguous)
