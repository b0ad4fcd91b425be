"""The CUDA C++ kernels of gru and gru_bidirectional, emulated: their suites, then the clusters."""

import pytest
import torch

import mbm_kernels
from mbm_kernels.ops.gru import layer_cuda, problem
from mbm_kernels.testing import Case
from mbm_kernels.testing.emulation import H200, SM_80, SMALL, Device, Emulated, on
from tests.conftest import raises
from tests.ops import test_gru, test_gru_bidirectional
from tests.ops.test_gru import sizes


class TestEmulated(Emulated, test_gru.TestGru):
    # The launcher's clusters on one multiprocessor and on many, each with whole and ragged units.
    @pytest.mark.parametrize("device", [H200, SMALL], ids=["H200", "small"])
    @pytest.mark.parametrize(
        ("hidden", "rounded"),
        [(100, False), (131, False), (256, True), (300, False), (512, True), (768, True)],
    )
    def test_clusters(self, backend, device, hidden, rounded):
        dtype = torch.bfloat16 if rounded else torch.float32
        rows = 9 if hidden < 512 else 3  # past a tile of them, and within one
        inputs = self.inputs(Case("", sizes(2, rows, 3, hidden)), dtype)
        problem.PROBLEMS.clear()  # they remember a cluster
        with on(device):
            self.check_forward(inputs, backend)
            self.check_backward(inputs, backend)
        problem.PROBLEMS.clear()

    def test_more_units_than_registers_hold(self, backend):
        extension = pytest.importorskip("mbm_kernels._C_cuda_emulated")
        for number, most in enumerate(layer_cuda.MOST_UNITS.values()):
            assert extension.gru_cuda_most_units(number) == most
        inputs = self.inputs(Case("", sizes(1, 1, 2, 513)), torch.float32)
        with raises(mbm_kernels.BackendUnavailableError, "at most 512 units, not 513"):
            self.run(inputs, backend)

    def test_a_device_without_clusters(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        problem.PROBLEMS.clear()
        with on(SM_80), raises(mbm_kernels.BackendUnavailableError, "capability 9.0"):
            self.run(inputs, backend)


class TestEmulatedBidirectional(Emulated, test_gru_bidirectional.TestGruBidirectional):
    pass


def test_clusters_are_chosen_by_what_runs_at_once():
    extension = pytest.importorskip("mbm_kernels._C_cuda_emulated")
    fields = extension.gru_cuda_problem_fields()

    def chosen(device: Device, **changes: int) -> int:
        values = {"T": 5, "B": 8, "H": 512, "dtype": 1, "directions": 1, "reverse": 0, "cluster": 0}
        with on(device):
            block = layer_cuda.native.block(fields, values | changes)
            return extension.gru_cuda_cluster(block, 0)

    assert chosen(H200) == 16
    assert chosen(H200, B=64) == 16  # 8 clusters at once
    assert chosen(H200, B=128, directions=2) == 8  # 4 turns of 8 against 2 of 16
    assert chosen(H200, H=64) == 4
    assert chosen(H200, H=768) == 16
    assert chosen(SM_80) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs here")
def test_the_public_backend_refuses_without_a_device():
    assert mbm_kernels.backends("gru")["cuda"] == "no CUDA device: torch sees none"
    shapes = ((3, 2, 3), (2, 5), (15, 3), (15, 5))
    with raises(mbm_kernels.BackendUnavailableError, "'cuda' cannot run: no CUDA device"):
        mbm_kernels.gru(*(torch.randn(shape) for shape in shapes), backend="cuda")
