"""torch.fx: functions and modules are single nodes of the graph."""

import pytest
import torch
from torch import fx
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
from torch.fx.experimental import optimization

import mbm_kernels
from mbm_kernels import nn
from tests.tools.cases import ALL, FUNCTIONS, MODULES, Model, assert_same, each_case


class Tracer(fx.Tracer):
    """One that takes a forward of `*tensors` for one of `count` arguments."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        symbols = (self.create_proxy("placeholder", f"x{i}", (), {}) for i in range(self.count))
        return root_fn, [self.root, *symbols]


def traced(module, count):
    return fx.GraphModule(module, Tracer(count).trace(module))


@each_case
def test_a_call_is_one_node(name):
    case = ALL[name]
    model, inputs = Model(case, "auto"), case.inputs(3)
    graph = traced(model, len(inputs))
    nodes = [n.op for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
    assert nodes == ["call_module" if name in MODULES else "call_function"]
    assert_same(graph(*inputs), model(*inputs))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_symbol_among_tensors_is_enough(name):
    """Whichever argument is the symbol, and with a call like it known."""
    case = FUNCTIONS[name]
    inputs, model = case.inputs(3), Model(case, "auto")
    expected = model(*inputs)
    for i, tensor in enumerate(inputs):
        graph = fx.symbolic_trace(_but_one(model, inputs, i))
        assert_same(graph(tensor), expected)


def _but_one(model, inputs, i):
    return lambda x: model.forward(*inputs[:i], x, *inputs[i + 1 :])


def test_what_is_no_tensor_is_refused_as_before():
    with pytest.raises(TypeError, match=r"gru: x: got list \[1\]; expected a torch.Tensor"):
        mbm_kernels.gru([1], None, torch.randn(3, 1), torch.randn(3, 1))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.act = torch.nn.ReLU()
        self.head = torch.nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x))))


class NodePathTracer(fx.Tracer):
    """As torchvision's create_feature_extractor: each node's place by the module that it is in."""

    def __init__(self):
        super().__init__()
        self.module, self.paths = "", {}

    def call_module(self, m, forward, args, kwargs):
        before, self.module = self.module, self.path_of_module(m)
        try:
            if not self.is_leaf_module(m, self.module):
                return forward(*args, **kwargs)
            return self.create_proxy("call_module", self.module, args, kwargs)
        finally:
            self.module = before

    def create_proxy(self, kind, target, args, kwargs, *rest, **named):
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        self.paths[self.module] = proxy.node
        return proxy


def test_features_by_the_path_of_a_module():
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    tracer = NodePathTracer()
    graph = tracer.trace(model)
    (output,) = graph.find_nodes(op="output")
    output.args = (tracer.paths["conv"],)
    features = fx.GraphModule(model, graph)
    features.graph.eliminate_dead_code()
    features.recompile()
    assert_same(features(x), model.conv(x))


def test_fuse_leaves_our_modules_and_their_results():
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    assert_same(optimization.fuse(model)(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_fx_quantization_takes_ours_for_floating_point():
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"mbm_kernels\.nn\.Conv2d stays in floating point"):
        prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
    assert_same(prepared(x), model(x))
    quantized = quantize_fx.convert_fx(prepared)
    assert isinstance(quantized.conv, nn.Conv2d)
    assert not isinstance(quantized.head, torch.nn.Conv2d)
