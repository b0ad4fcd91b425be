"""Backend selection, registration and the paths around a kernel, on additive_attention."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels._core import cost, dispatch
from mbm_kernels._core.op import OPS
from tests import children
from tests.conftest import raises

OP = "additive_attention"
SIZES = {"B": 2, "T": 3, "S": 5, "D": 8, "E": 4, "elements": 240, "training": 0}
CPU = torch.device("cpu")


@pytest.fixture
def inputs():
    shapes = ((2, 3, 8), (2, 5, 8), (2, 5, 4), (8,))
    return [torch.randn(s, requires_grad=True) for s in shapes]


@pytest.fixture
def _restored():
    yield
    mbm_kernels.set_backend("auto")


def select(backend="auto", device=CPU, dtype=torch.float32, **sizes):
    return dispatch.select(OP, backend, device, dtype, {**SIZES, **sizes})


class TestSelect:
    def test_predictions_decide(self, predictions):
        predictions(lambda op, sizes: sizes["B"] == 2)
        assert select() == "cpu"
        assert select(B=5) == "torch"
        assert select(dtype=torch.float64) == "torch"
        assert select(dtype=torch.bfloat16) == "torch"
        assert select(device=torch.device("meta")) == "torch"

    def test_rules_of_a_gpu_decide_there(self, monkeypatch):
        rule = {"backend": "triton", "device": "cuda", "dtypes": ["bfloat16"], "results": "none"}
        rules = (dispatch.Rule.parse({**rule, "where": {"B": [2, 4], "S": [None, 8]}}),)
        monkeypatch.setitem(dispatch._tables, OP, dispatch.Table(("triton", "cpu", "torch"), rules))
        monkeypatch.setattr(dispatch, "why_not", lambda *_, **__: None)
        cuda = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
        assert select(**cuda) == select(**cuda, B=4) == "triton"
        for sizes in ({"B": 5}, {"B": 1}, {"S": 9}):
            assert select(**cuda, **sizes) == "torch"
        assert select(device=torch.device("cuda")) == "torch"

    def test_no_constants_mean_torch(self, monkeypatch):
        monkeypatch.setattr(cost, "table", lambda: None)
        dispatch.forget_choices()
        assert select() == "torch"
        assert select("cpu") == "cpu"
        dispatch.forget_choices()

    def test_named_backend_raises_rather_than_change(self):
        with raises(
            mbm_kernels.BackendUnavailableError, "backend 'cuda' cannot run", "use backend"
        ):
            select("cuda")
        with raises(mbm_kernels.BackendUnavailableError, "float64"):
            select("cpu", dtype=torch.float64)
        assert issubclass(mbm_kernels.BackendUnavailableError, RuntimeError)

    @pytest.mark.parametrize(
        "make",
        [
            lambda **b: nn.Conv2d(2, 3, 1, **b),
            lambda **b: nn.ConvBiasAct(2, 3, 1, **b),
            lambda **b: nn.GRU(2, 3, **b),
            lambda **b: nn.GRUCell(2, 3, **b),
            lambda **b: nn.AdditiveAttention(2, 3, 4, **b),
            lambda **b: nn.MultiheadAttention(4, 2, **b),
            lambda **b: nn.ConcatLinear((2, 3), 4, **b),
            lambda **b: nn.LinearDistillationLoss(**b),
        ],
    )
    def test_modules_refuse_an_unknown_name(self, make):
        with raises(ValueError, r"^nn\.\w+: backend: got 'fast'; expected one of auto, cpu"):
            make(backend="fast")
        assert make(backend="torch").backend == "torch"

    @pytest.mark.usefixtures("_restored")
    def test_set_backend(self, predictions):
        predictions(lambda op, sizes: True)
        mbm_kernels.set_backend("torch")
        assert select() == "torch"
        mbm_kernels.set_backend("cpu", OP)
        assert select() == "cpu"
        assert dispatch.default("gru") == "torch"
        mbm_kernels.set_backend("auto")
        assert select() == "cpu"
        with raises(ValueError, "expected one of auto, cpu"):
            mbm_kernels.set_backend("fast")
        with raises(ValueError, "op: got 'conv'"):
            mbm_kernels.set_backend("torch", "conv")
        with raises(mbm_kernels.BackendUnavailableError, "cuda"):
            mbm_kernels.set_backend("cuda", OP)

    @pytest.mark.usefixtures("_restored")
    def test_preferring_takes_what_there_is_and_ends(self, torch_wins):
        mbm_kernels.set_backend("torch", "gru")

        def fails():
            with dispatch.preferring("cpu"):
                assert select() == "cpu"
                assert dispatch.default("gru") == "cpu"
                raise KeyError

        with pytest.raises(KeyError):
            fails()
        with dispatch.preferring("cuda"):
            assert select() == "torch"
        assert select() == "torch"
        assert dispatch.default("gru") == "torch"

    def test_disabled_nests_and_ends_with_an_error(self, predictions):
        predictions(lambda op, sizes: True)
        with mbm_kernels.disabled():
            with pytest.raises(KeyError), mbm_kernels.disabled():
                raise KeyError
            assert select() == "torch"
            assert select("cpu") == "torch"
        assert select() == "cpu"

    def test_environment_sets_the_default(self, monkeypatch):
        monkeypatch.setattr(dispatch, "_defaults", {})
        monkeypatch.setenv("MBM_BACKEND", "cpu")
        assert select() == "cpu"
        monkeypatch.setenv("MBM_BACKEND", "gpu")
        with raises(ValueError, "MBM_BACKEND: got 'gpu'; expected one of"):
            select()

    def test_backends_names_reasons(self):
        reasons = mbm_kernels.backends(OP)
        assert list(reasons) == ["cpu", "triton", "cuda", "torch"]
        assert reasons["cpu"] is None
        assert reasons["torch"] is None
        assert "no cuda backend" in mbm_kernels.backends("concat_linear")["cuda"]
        with raises(ValueError, "op: got 'attention'; expected one of additive_attention"):
            mbm_kernels.backends("attention")


class TestPaths:
    """The kernel is reached directly or through the registered op, with one result."""

    def test_dispatch_modes_see_the_registered_op(self, inputs):
        class Names(TorchDispatchMode):
            seen: list = []

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                self.seen.append(str(func))
                return func(*args, **(kwargs or {}))

        expected, _ = mbm_kernels.additive_attention(*inputs, backend="cpu")
        with Names() as mode:
            context, _ = mbm_kernels.additive_attention(*inputs, backend="cpu")
        assert "mbm_kernels.additive_attention.default" in mode.seen
        assert torch.equal(context, expected)

    def test_subclass_takes_the_registered_op(self, inputs):
        query = TwoTensor(inputs[0].detach(), inputs[0].detach())
        context, _ = mbm_kernels.additive_attention(query, *inputs[1:], backend="cpu")
        assert type(context) is TwoTensor
        expected, _ = mbm_kernels.additive_attention(*inputs, backend="cpu")
        assert torch.equal(context.a, expected)

    def test_flop_counter_sees_it(self, inputs):
        counter = FlopCounterMode(display=False)
        with counter, torch.profiler.profile() as profile:
            mbm_kernels.additive_attention(*inputs, backend="cpu")
        names = [event.key for event in profile.key_averages()]
        assert "mbm_kernels::additive_attention" in names

    def test_checkpoint_and_grad_only_where_needed(self, inputs):
        def run(*args):
            return mbm_kernels.additive_attention(*args, backend="cpu")[0]

        expected = torch.autograd.grad(run(*inputs).sum(), inputs)
        actual = torch.autograd.grad(checkpoint(run, *inputs, use_reentrant=False).sum(), inputs)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
        for position in range(4):
            alone = [x.detach() for x in inputs]
            alone[position].requires_grad_()
            (grad,) = torch.autograd.grad(run(*alone).sum(), alone[position])
            assert torch.equal(grad, expected[position])

    def test_functorch(self, inputs):
        query, *rest = [x.detach() for x in inputs]

        def loss(q):
            return mbm_kernels.additive_attention(q, *rest, backend="cpu")[0].sin().sum()

        leaf = query.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(query), expected)
        stacked = torch.stack([query, query * 2])
        mapped = torch.func.vmap(loss)(stacked)
        torch.testing.assert_close(mapped, torch.stack([loss(query), loss(query * 2)]))
        jacobian = torch.func.jacrev(loss)(query)
        torch.testing.assert_close(jacobian, expected)

    def test_one_argument_computed_from_another(self, inputs):
        """A double backward differentiates each argument alone, not through the others."""
        x = torch.randn(2, 3, 8, requires_grad=True)

        def run(backend):
            key = x.sin()
            context, _ = mbm_kernels.additive_attention(x, key, key, inputs[3], backend=backend)
            (first,) = torch.autograd.grad(context.sin().sum(), x, create_graph=True)
            return torch.autograd.grad(first.pow(2).sum(), x)[0]

        torch.testing.assert_close(run("cpu"), run("torch"), rtol=1e-4, atol=1e-5)

    def test_export_and_dynamic_shapes(self, inputs):
        class Model(torch.nn.Module):
            def forward(self, q, k, value, v):
                return mbm_kernels.additive_attention(q, k, value, v, backend="cpu")[0]

        plain = tuple(x.detach() for x in inputs)
        program = torch.export.export(Model(), plain)
        targets = {str(node.target) for node in program.graph.nodes}
        assert "mbm_kernels.additive_attention.default" in targets
        torch.testing.assert_close(program.module()(*plain), Model()(*plain))

        torch._dynamo.reset()
        compiled = torch.compile(Model(), fullgraph=True, dynamic=True, backend="aot_eager")
        for steps in (3, 4, 6, 7, 9):
            args = (torch.randn(2, steps, 8), *plain[1:])
            torch.testing.assert_close(compiled(*args), Model()(*args))

    def test_schema_names(self):
        schema = str(OPS[OP].registered._schema)
        assert schema.startswith("mbm_kernels::additive_attention(Tensor query, Tensor key")


def test_forced_isa_is_obeyed():
    code = (
        "import os; os.environ['MBM_ISA'] = 'baseline';"
        "from mbm_kernels._core import native; print(native.isa())"
    )
    out = children.python("-c", code)
    assert out.stdout.strip() == "baseline", out.stderr
