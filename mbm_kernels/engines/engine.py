"""What an engine is: whether it can run here, what it is called, and how a model becomes a call."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from mbm_kernels.engines.model import Model


class Session(ABC):
    """A model built for one number of threads, with its inputs bound."""

    @abstractmethod
    def run(self) -> object:
        """Runs the model once: what is timed."""

    @abstractmethod
    def outputs(self) -> list[Tensor]:
        """The results of the last run."""


class Engine(ABC):
    """An inference engine.

    name: as results name it. package: its distribution. module: what is imported. pytorch: it is
    PyTorch under other options, so that it counts on PyTorch's side. compiles: building takes
    minutes, of a compiler.
    """

    name: str
    package: str
    module: str
    pytorch = False
    compiles = False

    def why_not(self) -> str | None:
        """Why it cannot run on this machine, in a line."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: pip install {self.package}"
        return None

    def refuses(self, model: Model) -> str | None:
        """Why it does not run this model, in a line."""
        return None

    def version(self) -> str:
        return importlib.metadata.version(self.package)

    @abstractmethod
    def build(self, model: Model, threads: int) -> Session:
        """The model on that many threads; it has run once."""


@contextmanager
def stdout_into(path: Path) -> Iterator[None]:
    """Within it what native code prints goes to a file: standard output may be JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.dup2(target, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(target)
