"""The CUDA C++ kernels of gru and gru_bidirectional, emulated: their suites, what runs where."""

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import cuda_launch, native
from mbm_kernels.ops.gru import layer_cuda, problem
from mbm_kernels.ops.gru.bidirectional import problem as bidirectional_problem
from mbm_kernels.testing import Case
from mbm_kernels.testing.emulation import H200, SM_80, SMALL, Device, Emulated, on
from tests.conftest import raises
from tests.ops import test_gru, test_gru_bidirectional
from tests.ops.test_gru import sizes

# Without clusters: room for one group of blocks, which takes several tiles of rows, and for both
# directions in turn; and for two.
ONE_GROUP = Device(4, 163 * 1024, 1)
TWO_GROUPS = Device(8, 163 * 1024, 1)


@pytest.fixture(autouse=True)
def _forgotten():
    """Problems remember the plan of a device."""

    def forget():
        problem.PROBLEMS.clear()
        bidirectional_problem.PROBLEMS.clear()

    forget()
    yield
    forget()


class TestEmulated(Emulated, test_gru.TestGru):
    # The launcher's clusters on one multiprocessor and on many, each with whole and ragged units;
    # groups on a device without clusters, and where no cluster holds the units.
    @pytest.mark.parametrize(
        ("device", "hidden", "rounded"),
        [
            *((device, 100, False) for device in (H200, SMALL, SM_80)),
            *((device, 131, False) for device in (H200, SMALL, SM_80)),
            *((device, 256, True) for device in (H200, SMALL, SM_80)),
            *((device, 300, False) for device in (H200, SMALL, SM_80)),
            *((device, 512, True) for device in (H200, SMALL, SM_80)),
            *((device, 768, True) for device in (H200, SMALL, SM_80)),
            *((device, 1021, False) for device in (H200, SM_80)),
            (SM_80, 1030, True),
            pytest.param(H200, 2048, True, marks=pytest.mark.slow),
        ],
    )
    def test_clusters_and_groups(self, backend, device, hidden, rounded):
        dtype = torch.bfloat16 if rounded else torch.float32
        rows = 9 if hidden < 512 else 3  # past a tile of them, and within one
        inputs = self.inputs(Case("", sizes(2, rows, 3, hidden)), dtype)
        with on(device):
            self.check_forward(inputs, backend)
            self.check_backward(inputs, backend)

    def test_more_units_than_registers_hold(self, backend):
        extension = pytest.importorskip("mbm_kernels._C_cuda_emulated")
        for number, most in enumerate(layer_cuda.MOST_UNITS.values()):
            assert extension.gru_cuda_most_units(number) == most
        inputs = self.inputs(Case("", sizes(1, 1, 2, 1025)), torch.float32)
        with raises(mbm_kernels.BackendUnavailableError, "at most 1024 units, not 1025"):
            self.run(inputs, backend)

    def test_a_device_with_too_few_blocks_at_once(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        expected = "7 units need 4 blocks that run at once, this device runs 3; try triton"
        with (
            on(Device(3, 163 * 1024, 1)),
            raises(mbm_kernels.BackendUnavailableError, expected),
        ):
            self.run(inputs, backend)


class TestEmulatedGroups(Emulated, test_gru.TestGru):
    device = ONE_GROUP


class TestEmulatedBidirectional(Emulated, test_gru_bidirectional.TestGruBidirectional):
    @pytest.mark.parametrize("device", [ONE_GROUP, TWO_GROUPS, SM_80], ids=["one", "two", "many"])
    def test_groups(self, backend, device):
        inputs = self.inputs(Case("", sizes(3, 19, 3, 37)), torch.float32)
        with on(device):
            self.check_forward(inputs, backend)
            self.check_backward(inputs, backend)


def rounded(x):
    """To tf32, the nearest, ties away from zero."""
    return ((x.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32Linear(torch.autograd.Function):
    """x w^T and its gradients as matrix instructions take them: factors rounded, sums are not."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return rounded(x) @ rounded(w).t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad = rounded(grad)
        return grad @ rounded(w), grad.flatten(0, -2).t() @ rounded(x).flatten(0, -2)


class Tf32Gru(test_gru.TestGru):
    """The error rule against what cuDNN makes of float32 where it may use tf32."""

    def stock(self, inputs, backend):
        x, h, lengths, reverse = (inputs.get(n) for n in ("x", "h0", "lengths", "reverse"))
        steps, batch, _ = x.shape
        h = x.new_zeros(batch, inputs["w_hh"].size(1)) if h is None else h
        b_ih, b_hh = (inputs.get(n, x.new_zeros(())) for n in ("b_ih", "b_hh"))
        by_input = Tf32Linear.apply(x, inputs["w_ih"]) + b_ih
        y = [torch.zeros_like(h)] * steps
        for t in range(steps - 1, -1, -1) if reverse else range(steps):
            by_state = Tf32Linear.apply(h, inputs["w_hh"]) + b_hh
            (ir, iz, i_n), (hr, hz, hn) = by_input[t].chunk(3, 1), by_state.chunk(3, 1)
            r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
            n = torch.tanh(i_n + r * hn)
            valid = torch.ones(batch, 1) if lengths is None else (lengths > t)[:, None].float()
            new = n + z * (h - n)
            h, y[t] = torch.where(valid > 0, new, h), new * valid
        return torch.stack(y), h


@pytest.mark.parametrize("device", [H200, ONE_GROUP], ids=["clusters", "groups"])
@pytest.mark.parametrize("case", Tf32Gru.cases, ids=str)
def test_tf32_is_within_the_budget_of_stock_tf32(case, device):
    pytest.importorskip("mbm_kernels._C_cuda_emulated")
    suite = Tf32Gru()
    inputs = suite.inputs(case, torch.float32)
    with cuda_launch.emulated(tf32=True), on(device):
        suite.check_forward(inputs, "cuda")
        suite.check_backward(inputs, "cuda")
        exact = suite.run(inputs, "torch")
        assert not torch.equal(suite.run(inputs, "cuda")[0], exact[0])


@pytest.mark.parametrize(
    ("device", "hidden"), [(H200, 300), (H200, 700), (SM_80, 300), (SM_80, 1021)]
)
def test_tf32_of_many_units(device, hidden):
    pytest.importorskip("mbm_kernels._C_cuda_emulated")
    suite = Tf32Gru()
    inputs = suite.inputs(Case("", sizes(2, 3, 3, hidden)), torch.float32)
    with cuda_launch.emulated(tf32=True), on(device):
        suite.check_forward(inputs, "cuda")
        suite.check_backward(inputs, "cuda")


def planned(device: Device, **changes: int) -> dict[str, int]:
    extension = pytest.importorskip("mbm_kernels._C_cuda_emulated")
    fields = extension.gru_cuda_problem_fields()
    values = dict.fromkeys(fields, 0) | {"T": 5, "B": 8, "H": 512, "dtype": 1, "directions": 1}
    with on(device):
        found: dict[str, int] = extension.gru_cuda_plan(native.block(fields, values | changes), 0)
    return found


def test_clusters_are_chosen_by_what_runs_at_once():
    assert planned(H200)["cluster"] == 16
    assert planned(H200, B=64)["cluster"] == 16  # 8 clusters at once
    assert planned(H200, B=128, directions=2)["cluster"] == 8  # 4 turns of 8 against 2 of 16
    assert planned(H200, H=64)["cluster"] == 4
    assert planned(H200, H=768)["cluster"] == 16
    assert planned(SM_80)["cluster"] == 0


def test_groups_have_a_tile_each_where_all_run_at_once():
    def groups(device: Device, **changes: int) -> tuple[int, int]:
        found = planned(device, **changes)
        assert found["cluster"] == 0
        assert found["flags"] == changes.get("directions", 1) * found["groups"] * (
            -(-found["needed"] // 32) * 32
        )
        return found["groups"], found["at_once"]

    assert groups(SM_80) == (1, 1)
    assert groups(SM_80, B=64) == (3, 1)  # 108 blocks, 32 to a group
    assert groups(SM_80, B=64, directions=2) == (1, 2)
    assert groups(SM_80, H=64, B=64) == (8, 1)
    assert groups(H200, H=1024, B=64) == (2, 1)
    assert groups(H200, H=2048, B=64, directions=2) == (1, 1)
    assert groups(SM_80, H=1024, dtype=0) == (1, 1)  # its weights fit into 163 KB a block
    too_many = planned(SM_80, H=2048)
    assert (too_many["groups"], too_many["needed"], too_many["resident"]) == (0, 128, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs here")
def test_the_public_backend_refuses_without_a_device():
    assert mbm_kernels.backends("gru")["cuda"] == "no CUDA device: torch sees none"
    shapes = ((3, 2, 3), (2, 5), (15, 3), (15, 5))
    with raises(mbm_kernels.BackendUnavailableError, "'cuda' cannot run: no CUDA device"):
        mbm_kernels.gru(*(torch.randn(shape) for shape in shapes), backend="cuda")
