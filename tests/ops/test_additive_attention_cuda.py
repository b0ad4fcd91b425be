"""The CUDA C++ kernels of additive attention, emulated: its suite, then what launches choose."""

import pytest
import torch

import mbm_kernels
from mbm_kernels.ops.additive_attention import backend_cuda
from mbm_kernels.testing import Case
from mbm_kernels.testing.emulation import H200, SM_80, SMALL, Emulated, on
from tests.conftest import raises
from tests.ops import test_additive_attention as suite
from tests.ops import test_additive_attention_keys as keys_suite
from tests.ops.test_additive_attention import sizes


class TestEmulated(Emulated, suite.TestAdditiveAttention):
    cases = [
        *suite.TestAdditiveAttention.cases,
        Case("several passes and stages", sizes(1, 20, 250, 40, 270), {"lengths": True}),
        Case("more than a chunk of queries", sizes(1, 41, 21, 33, 5), {"mask": "full"}),
    ]

    # Clusters of 8, of 1 and of 2 for a tile of 20; of H200 tiles of 4.
    @pytest.mark.parametrize("device", [H200, SM_80, SMALL], ids=["H200", "sm_80", "small"])
    def test_clusters(self, backend, device):
        shape = (2, 20, 150, 35, 19)
        inputs = self.inputs(
            Case("", sizes(*shape), {"mask": "keys", "lengths": True}), torch.float32
        )
        with on(device):
            self.check_forward(inputs, backend)
            self.check_backward(inputs, backend)

    def test_rows_do_not_depend_on_the_cluster(self, backend):
        inputs = self.inputs(Case("", sizes(1, 5, 96, 33, 12)), torch.float32)
        expected = self.run(inputs, backend)
        for device in (H200, SM_80):
            with on(device):
                torch.testing.assert_close(self.run(inputs, backend), expected)

    def test_most_positions(self, backend):
        most = backend_cuda.MOST_POSITIONS
        extension = pytest.importorskip("mbm_kernels._C_cuda_emulated")
        assert extension.additive_attention_cuda_most_s == most
        inputs = self.inputs(Case("", sizes(1, 2, most, 2, 3)), torch.float32)
        with on(SM_80):
            self.check_forward(inputs, backend)
        inputs = self.inputs(Case("", sizes(1, 1, most + 1, 2, 3)), torch.float32)
        with raises(mbm_kernels.BackendUnavailableError, "at most 4096 positions"):
            self.run(inputs, backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs here")
def test_the_public_backend_refuses_without_a_device():
    assert mbm_kernels.backends("additive_attention")["cuda"] == "no CUDA device: torch sees none"
    inputs = [torch.randn(1, 2, 3), torch.randn(1, 4, 3), torch.randn(1, 4, 5), torch.randn(3)]
    with raises(mbm_kernels.BackendUnavailableError, "'cuda' cannot run: no CUDA device"):
        mbm_kernels.additive_attention(*inputs, backend="cuda")


class TestKeys(Emulated):
    """Steps of decoding read what was made of the key."""

    suite = keys_suite.SUITE

    @pytest.fixture
    def decoded(self, monkeypatch):
        """Queries of each launch that read prepared keys."""
        extension = pytest.importorskip("mbm_kernels._C_cuda_emulated")
        launch, queries = extension.additive_attention_cuda_decode, []

        def counted(problem, inputs, *rest):
            queries.append(len(queries))
            return launch(problem, inputs, *rest)

        monkeypatch.setattr(extension, "additive_attention_cuda_decode", counted)
        return queries

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_error_rule(self, dtype):
        for case in (*self.suite.cases, *self.suite.edge_cases):
            self.suite.check_forward(self.suite.inputs(case, dtype), "cuda")

    # Clusters of 8, of 1 and of 2; more features than lie in shared memory at a time.
    @pytest.mark.parametrize("device", [H200, SM_80, SMALL], ids=["H200", "sm_80", "small"])
    @pytest.mark.parametrize("queries", [1, 2, 4, 7, backend_cuda.MOST_DECODED])
    def test_every_tile(self, queries, device, decoded):
        for shape, scale in (((2, queries, 70, 35, 19), 1.0), ((1, queries, 9, 518, 5), 0.1)):
            case = Case("", sizes(*shape), {"mask": "keys", "lengths": True}, scale=scale)
            with on(device):
                self.suite.check_forward(self.suite.inputs(case, torch.float32), "cuda")
        assert len(decoded) == 2

    def test_others_read_the_key(self, decoded):
        case = Case("", sizes(1, backend_cuda.MOST_DECODED + 1, 9, 5, 3))
        self.suite.check_forward(self.suite.inputs(case, torch.float32), "cuda")
        assert not decoded

    def test_positions_past_the_length_have_no_influence(self):
        inputs = keys_suite.drawn(batch=2, positions=21)
        expected = keys_suite.with_keys(**inputs, backend="cuda")
        beyond = torch.arange(21) >= inputs["key_lengths"][:, None]
        inputs["key"][beyond] = torch.nan
        keys_suite.same(keys_suite.with_keys(**inputs, backend="cuda"), expected)
