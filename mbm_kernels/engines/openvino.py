"""OpenVINO: one stream in float32; inputs and outputs are PyTorch's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbm_kernels.engines.engine import Engine, Session
from mbm_kernels.engines.model import Model


class OpenVinoSession(Session):
    """One request, with tensors that share memory with `given` and `outputs`."""

    def __init__(self, request: Any, given: tuple[Tensor, ...], tensor_of: Any, count: int):
        self._request, self._given = request, given
        for i, x in enumerate(given):
            request.set_input_tensor(i, tensor_of(x.numpy(), shared_memory=True))
        self.run()  # tells the shapes
        found = [request.get_output_tensor(i).data for i in range(count)]
        self._outputs = [torch.from_numpy(y.copy()) for y in found]
        for i, y in enumerate(self._outputs):
            request.set_output_tensor(i, tensor_of(y.numpy(), shared_memory=True))
        self.run()

    def run(self) -> object:
        return self._request.infer(share_outputs=True)  # else it copies them for the caller

    def outputs(self) -> list[Tensor]:
        return self._outputs


class OpenVino(Engine):
    name = package = module = "openvino"

    def build(self, model: Model, threads: int) -> Session:
        import openvino

        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(model.onnx),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "f32",  # where the CPU has bfloat16 it would take that
                "ENABLE_HYPER_THREADING": True,  # else a thread a core is the most it takes
                "ENABLE_CPU_PINNING": False,  # no other form is pinned
            },
        )
        request = compiled.create_infer_request()
        return OpenVinoSession(request, model.contiguous, openvino.Tensor, len(compiled.outputs))
