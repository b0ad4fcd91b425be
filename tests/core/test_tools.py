"""Our operations and modules under torch's profiler, FLOP counter, fx, jit.trace and export."""

import pytest
import torch
from torch.profiler import profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import mbm_kernels
from mbm_kernels import nn
from tests import children


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class TestProfiler:
    def names(self, call) -> dict[str, list]:
        with profile(record_shapes=True) as recorded:
            call()
        events = recorded.key_averages(group_by_input_shape=True)
        return {e.key: e.input_shapes for e in events if e.key.startswith("mbm_kernels::")}

    @pytest.mark.parametrize("needs_grad", [False, True])
    def test_each_operation_and_backend_has_its_name(self, needs_grad):
        gru = nn.GRU(3, 5, backend="cpu").requires_grad_(needs_grad)
        parts = [torch.randn(2, 4), torch.randn(2, 6)]
        linear = nn.ConcatLinear((4, 6), 8, backend="cpu").requires_grad_(needs_grad)

        def call():
            total = gru(torch.randn(7, 2, 3))[0].sum() + linear(*parts).sum()
            if needs_grad:
                total.backward()

        names = self.names(call)
        backwards = {f"{n}_backward{b}" for n in ("gru", "concat_linear") for b in ("", ".cpu")}
        assert {n.removeprefix("mbm_kernels::") for n in names} == {
            *("gru", "gru.cpu", "concat_linear", "concat_linear.cpu"),
            *(backwards if needs_grad else ()),
        }
        assert names["mbm_kernels::gru.cpu"][0] == [7, 2, 3]
        assert names["mbm_kernels::gru"][0] == [7, 2, 3]

    def test_the_torch_backend_has_one_as_well(self):
        x = torch.randn(2, 3)
        names = self.names(lambda: mbm_kernels.concat_linear([x], x, backend="torch"))
        assert set(names) == {"mbm_kernels::concat_linear", "mbm_kernels::concat_linear.torch"}

    def test_nodes_of_the_graph_have_it(self):
        x = torch.randn(2, 3, requires_grad=True)
        y = mbm_kernels.concat_linear([x], x.detach(), backend="cpu")
        assert y.grad_fn.name() == "mbm_kernels::concat_linear_backward"


class TestFlops:
    @pytest.mark.parametrize("groups", [1, 4, 16])
    @pytest.mark.parametrize("sizes", [(2, 16, 9, 8), (16, 9, 8)])
    def test_convolution_with_groups(self, groups, sizes):
        x = torch.randn(sizes, requires_grad=True)
        stock = torch.nn.Conv2d(16, 32, 3, padding=1, stride=2, groups=groups)
        ours = nn.Conv2d(16, 32, 3, padding=1, stride=2, groups=groups, backend="cpu")
        count = flops(lambda: ours(x).sum().backward())
        assert count == flops(lambda: stock(x).sum().backward())
        batch = sizes[0] if len(sizes) == 4 else 1
        assert flops(lambda: ours(x)) == 2 * batch * 5 * 4 * 32 * 16 // groups * 9

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_layers_of_gru(self, bidirectional):
        x, options = torch.randn(5, 2, 3), {"num_layers": 2, "bidirectional": bidirectional}
        stock = torch.nn.GRU(3, 4, **options)
        ours = nn.GRU(3, 4, **options, backend="cpu")
        assert flops(lambda: ours(x)) == flops(lambda: stock(x))

    def test_attention_without_weights_counts_as_on_a_gpu(self):
        q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 7, 8)
        forward = 2 * 2 * 2 * 3 * 5 * 7 * 8
        assert flops(lambda: mbm_kernels.cross_attention(q, k, k, backend="cpu")) == forward
        both = flops(lambda: mbm_kernels.cross_attention(q, k, k, backend="cpu").sum().backward())
        assert both == forward * 7 // 2

    def test_a_compiled_graph_counts_as_eager(self):
        torch._dynamo.reset()
        layer, x = nn.GRUCell(3, 4, backend="cpu"), torch.randn(2, 3)
        compiled = torch.compile(layer, backend="aot_eager")
        compiled(x).sum().backward()
        assert flops(lambda: compiled(x).sum().backward()) == flops(
            lambda: layer(x).sum().backward()
        )

    @pytest.mark.parametrize("first", ["torch.utils.flop_counter", "mbm_kernels"])
    def test_whichever_is_imported_first(self, first):
        code = (
            f"import {first}, torch, mbm_kernels; from torch.utils.flop_counter import *\n"
            "x = torch.ones(2, 3)\n"
            "with FlopCounterMode(display=False) as counter:\n"
            "    mbm_kernels.concat_linear([x], x, backend='cpu')\n"
            "print(counter.get_total_flops())"
        )
        out = children.python("-c", code)
        assert out.stdout.strip() == "24", out.stderr


MODULES = {
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "ConvBiasAct": (lambda: nn.ConvBiasAct(3, 4, 3, activation="relu"), (2, 3, 6, 6)),
    "GRU": (lambda: nn.GRU(3, 4), (5, 2, 3)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), (5, 3)),
    "ConcatLinear": (lambda: nn.ConcatLinear((3,), 4), (5, 3)),
}


class TestTracers:
    @pytest.mark.parametrize("name", MODULES)
    def test_fx_takes_modules_for_leaves(self, name):
        make, shape = MODULES[name]
        model, x = torch.nn.Sequential(make()), torch.randn(shape)
        traced = torch.fx.symbolic_trace(model)
        assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]
        torch.testing.assert_close(traced(x), model(x))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: nn.MultiheadAttention(16, 2),
            lambda: nn.AdditiveAttention(3, 4, 5),
            lambda: nn.LinearDistillationLoss(),
        ],
    )
    def test_fx_does_not_call_a_leaf(self, make):
        assert torch.fx.symbolic_trace(torch.nn.Sequential(make())).graph.nodes

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
    @pytest.mark.parametrize("name", ["Conv2d", "GRU", "GRUCell"])
    def test_jit_trace_is_checked_and_trains(self, name, backend):
        make, shape = MODULES[name]
        module, x = make(), torch.randn(shape)
        module.backend = backend
        with torch.no_grad():
            traced = torch.jit.trace(module, (x,))
        x = torch.randn(shape)

        def results(run):
            y = run(x)
            y = y[0] if isinstance(y, tuple) else y
            return (y, *torch.autograd.grad(y.sin().sum(), list(module.parameters())))

        for a, e in zip(results(traced), results(module), strict=True):
            torch.testing.assert_close(a, e)


class TestSymbolicSizes:
    """A range of sizes in which the kernel wins from some size on is neither split nor refused."""

    @pytest.fixture(autouse=True)
    def _boundary_inside(self, predictions):
        predictions(lambda op, sizes: sizes["B"] >= 8)

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("example", [4, 16])
    @pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
    @pytest.mark.parametrize("name", ["Conv2d", "GRU"])
    def test_export(self, name, backend, example, strict):
        module = (nn.Conv2d(3, 4, 3) if name == "Conv2d" else nn.GRU(3, 4)).eval()
        module.backend = backend
        shape = (lambda b: (b, 3, 6, 6)) if name == "Conv2d" else (lambda b: (5, b, 3))
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(
            module,
            (torch.randn(shape(example)),),
            dynamic_shapes=({0 if name == "Conv2d" else 1: batch},),
            strict=strict,
        )
        for size in (2, 7, 8, 64):
            x = torch.randn(shape(size))
            torch.testing.assert_close(program.module()(x), module(x))
        targets = " ".join(str(node.target) for node in program.graph.nodes)
        ours = backend == "cpu" or (backend == "auto" and example >= 8) or name == "GRU"
        assert ("mbm_kernels" in targets) == ours

    def test_compile_does_not_compile_again(self):
        torch._dynamo.reset()
        layer = nn.GRU(3, 4)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for size in (4, 7, 8, 40):
                x = torch.randn(5, size, 3)
                torch._dynamo.mark_dynamic(x, 1, min=2, max=64)
                torch.testing.assert_close(compiled(x), layer(x))


class TestListsOfTensors:
    """Gradients of concat_linear where some of the inputs, or none of them, need one."""

    def run(self, first, second, weight):
        return mbm_kernels.concat_linear([first, second], weight, backend="cpu").sin().sum()

    @pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (0, 1), (0, 1, 2)])
    def test_subclasses(self, needed):
        plain = [torch.randn(3, 2), torch.randn(3, 4), torch.randn(5, 6)]
        for i in needed:
            plain[i].requires_grad_()
        expected = torch.autograd.grad(self.run(*plain), [plain[i] for i in needed])
        twice = [TwoTensor(x.detach(), x.detach()) for x in plain]
        for i in needed:
            twice[i].requires_grad_()
        actual = torch.autograd.grad(self.run(*twice), [twice[i] for i in needed])
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.a, e)

    @pytest.mark.slow  # compiles C++
    def test_inductor(self):
        torch._dynamo.reset()
        x, y, w = torch.randn(3, 2), torch.randn(3, 4), torch.randn(5, 6, requires_grad=True)
        (expected,) = torch.autograd.grad(self.run(x, y, w), w)
        (actual,) = torch.autograd.grad(torch.compile(self.run)(x, y, w), w)
        torch.testing.assert_close(actual, expected)

    def test_an_output_that_is_not_used(self):
        """No gradient reaches the backward of the registered operation."""
        x, w = torch.randn(3, 2), torch.randn(5, 2, requires_grad=True)
        with FlopCounterMode(display=False):
            y = mbm_kernels.concat_linear([x], w, backend="cpu")
            (grad,) = torch.autograd.grad(
                y, w, torch.zeros_like(y), allow_unused=True, materialize_grads=True
            )
        assert torch.equal(grad, torch.zeros_like(w))
