"""`pytest benchmarks --benchmark-only`: the small cases under pytest-benchmark."""

import pytest
import torch

from mbm_kernels._core import timing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="torch threads")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest):
    with timing.threads(request.config.getoption("--threads")):
        yield
