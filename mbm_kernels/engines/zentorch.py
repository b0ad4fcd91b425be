"""zentorch, AMD's backend of torch.compile, for CPUs with AVX-512."""

from __future__ import annotations

import importlib
import re

import torch

from mbm_kernels._core import processor
from mbm_kernels.engines.engine import Engine, Session
from mbm_kernels.engines.inductor import CompiledSession, frozen
from mbm_kernels.engines.model import Model


class ZenTorch(Engine):
    """Its threads are PyTorch's; each of its versions is for one minor version of torch."""

    name = package = module = "zentorch"
    compiles = True

    def why_not(self) -> str | None:
        if processor.best_isa(processor.read_cpuinfo()) != "avx512":
            return "it does nothing on a CPU without AVX-512"
        if reason := super().why_not():
            return reason
        ours, theirs = (
            ".".join(re.findall(r"\d+", v)[:2]) for v in (torch.__version__, self.version())
        )
        return (
            None
            if ours == theirs
            else f"got one for torch {theirs}: pip install zentorch=={ours}.*"
        )

    def build(self, model: Model, threads: int) -> Session:
        importlib.import_module(self.module)  # registers the backend
        return CompiledSession(frozen(model.module, backend="zentorch"), model.inputs)
