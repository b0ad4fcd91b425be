import pytest
import torch

from mbm_kernels.testing import suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite.generate(metafunc)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def raises(error: type[Exception], *fragments: str):
    """pytest.raises whose message holds each fragment (a regular expression), in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(f"(?:{f})" for f in fragments))
