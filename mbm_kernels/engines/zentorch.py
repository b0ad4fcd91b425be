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
        wanted, made_for = _minor(torch.__version__), _minor(self.version())
        if wanted != made_for:
            return f"its version is for torch {made_for}: pip install zentorch=={wanted}.*"
        return None

    def refuses(self, model: Model) -> str | None:
        """It leaves some CPUs with AVX-512 (Ice Lake) to PyTorch, as it says once imported."""
        package = importlib.import_module(self.module)
        return None if package._C.is_avx512_supported() else "it does nothing on this CPU"

    def build(self, model: Model, threads: int) -> Session:
        importlib.import_module(self.module)  # registers the backend
        return CompiledSession(frozen(model.module, backend="zentorch"), model.inputs)


def _minor(version: str) -> str:
    """Major and minor, as 2.13 of 2.13.0+cpu."""
    return ".".join(re.findall(r"\d+", version)[:2])
