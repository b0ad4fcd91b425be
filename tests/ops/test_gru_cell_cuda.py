"""The CUDA C++ kernels of gru_cell, emulated: its suite, then what launches choose."""

import pytest
import torch

import mbm_kernels
from mbm_kernels.testing import Case
from mbm_kernels.testing.emulation import H200, SM_80, SMALL, Emulated, on
from tests.conftest import raises
from tests.ops import test_gru_cell as suite
from tests.ops.test_gru_cell import sizes


class TestEmulated(Emulated, suite.TestGruCell):
    cases = [
        *suite.TestGruCell.cases,
        Case("rows on 16 bytes, chunks past a block", sizes(9, 272, 40)),
    ]

    # Clusters of 8 with tiles of 8 rows, of 1, and tiles of 32 or 16 rows.
    @pytest.mark.parametrize("device", [H200, SM_80, SMALL], ids=["H200", "sm_80", "small"])
    @pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16"])
    def test_clusters(self, backend, device, rounded):
        inputs = self.inputs(
            Case("", sizes(35, 1032, 24)), torch.bfloat16 if rounded else torch.float32
        )
        with on(device):
            self.check_forward(inputs, backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs here")
def test_the_public_backend_refuses_without_a_device():
    assert mbm_kernels.backends("gru_cell")["cuda"] == "no CUDA device: torch sees none"
    shapes = ((2, 3), (2, 5), (15, 3), (15, 5))
    with raises(mbm_kernels.BackendUnavailableError, "'cuda' cannot run: no CUDA device"):
        mbm_kernels.gru_cell(*(torch.randn(shape) for shape in shapes), backend="cuda")
