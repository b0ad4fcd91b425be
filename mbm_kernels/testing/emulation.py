"""The CUDA C++ kernels of an operation under its own suite, emulated on the host."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

import pytest
import torch

from mbm_kernels._core import cuda_launch


@dataclass(frozen=True)
class Device:
    """What launchers see of a GPU."""

    multiprocessors: int
    shared: int  # bytes of a block at most
    max_cluster: int


H200 = Device(132, 227 * 1024, 8)
SM_80 = Device(108, 163 * 1024, 1)
SMALL = Device(1, 227 * 1024, 8)  # launchers take the tiles that they would for a large batch


@contextmanager
def on(device: Device) -> Iterator[None]:
    """Emulated launches within this context see this device."""
    if not backends():
        yield
        return
    cuda_launch.emulation().set_device(*astuple(device))
    try:
        yield
    finally:
        cuda_launch.emulation().set_device(*astuple(H200))


def backends() -> list[str]:
    """What is emulated; nothing beside a GPU, where the suite itself runs the kernels."""
    return [] if torch.cuda.is_available() else ["cuda"]


def of(suite: Any) -> AbstractContextManager[Any]:
    """A context in which the suite's backends can run."""
    return cuda_launch.emulated() if suite.emulated and backends() else nullcontext()


class Emulated:
    """Put it before an OpSuite: all of its tests run on the emulated cuda backend."""

    emulated: ClassVar[bool] = True
    device: ClassVar[Device] = SMALL
    # Of one code for all backends: the operation's own suite has run them, by the same kernels.
    test_each_gradient_alone: ClassVar[None] = None
    test_flops_are_the_stock_forms: ClassVar[None] = None

    @pytest.fixture(autouse=True)
    def _emulated(self) -> Iterator[None]:
        with of(type(self)), on(self.device):
            yield
