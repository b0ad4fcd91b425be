"""mbm_kernels.engines: right results of each engine, and what is said where one does not run."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mbm_kernels import engines
from mbm_kernels._core import processor, timing
from mbm_kernels.engines import errors, mnn, zentorch
from tests.bench.engines import Fake, fakes  # noqa: F401

onnx = pytest.importorskip("onnx", reason="ONNX packages: pip install '.[peers]'")
RUNTIMES = ("onnxruntime", "openvino", "MNN")
# MNN's Winograd F(6x6, 3x3) has 2e-4 here, as 3e-3 of larger layers is its known error.
MOST_ERROR = {"onnxruntime": 1e-6, "openvino": 1e-6, "MNN": 1e-3}


class Layer(nn.Module):
    """A convolution with residual and relu."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x, residual):
        return torch.relu(self.conv(x) + residual)


def onnx_model(nodes, inputs, outputs, weights):
    """By hand: an export takes 10 s at first."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper

    def infos(tensors):
        kind = onnx.TensorProto.FLOAT
        return [helper.make_tensor_value_info(n, kind, list(t.shape)) for n, t in tensors.items()]

    graph = helper.make_graph(
        [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes],
        "graph",
        infos(inputs),
        infos(outputs),
        [numpy_helper.from_array(w.detach().numpy(), name) for name, w in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()


def convolution():
    layer = Layer().eval()
    x, residual = torch.randn(2, 16, 12, 12), torch.randn(2, 16, 12, 12)
    nodes = [
        ("Conv", ["x", "w", "b"], ["c"], {"pads": [1] * 4, "kernel_shape": [3, 3]}),
        ("Add", ["c", "residual"], ["a"]),
        ("Relu", ["a"], ["y"]),
    ]
    weights = {"w": layer.conv.weight, "b": layer.conv.bias}
    exported = onnx_model(nodes, {"x": x, "residual": residual}, {"y": x}, weights)
    x = x.contiguous(memory_format=torch.channels_last)  # as PyTorch is fastest
    return engines.Model(layer, (x, residual), exported)


def gru():
    layer, x, h0 = nn.GRU(8, 16).eval(), torch.randn(5, 2, 8), torch.randn(1, 2, 16)

    def zrh(w):  # PyTorch's order is r, z, h
        r, z, h = w.detach().chunk(3)
        return torch.cat([z, r, h])[None]

    bias = torch.cat([zrh(layer.bias_ih_l0), zrh(layer.bias_hh_l0)], 1)
    weights = {"w": zrh(layer.weight_ih_l0), "r": zrh(layer.weight_hh_l0), "b": bias}
    options = {"hidden_size": 16, "linear_before_reset": 1}
    nodes = [("GRU", ["x", "w", "r", "b", "", "h0"], ["y", "h_n"], options)]
    outputs = {"y": torch.empty(5, 1, 2, 16), "h_n": h0}
    return engines.Model(layer, (x, h0), onnx_model(nodes, {"x": x, "h0": h0}, outputs, weights))


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("make", [convolution, gru])
def test_an_engine_is_right(name, make):
    engine = engines.ENGINES[name]
    if reason := engine.why_not():
        pytest.skip(reason)
    model = make()
    if make is gru and name == "MNN":
        assert engine.refuses(model) == "it is run on convolutions alone"
        return
    truth = model.truth()
    with timing.threads(2):
        found = engines.sessions(model, truth, engines=[engine])
    assert found.missing == {}
    session, measured = found.built[name], found.measured[name]
    assert measured.error < MOST_ERROR[name]
    assert measured.version[0].isdigit()
    # Its inputs last over runs, and it computes with them as they are.
    for _ in range(3):
        session.run()
    again = engines.relative_error(session.outputs(), truth)
    assert again == pytest.approx(measured.error, abs=1e-7)


def test_inputs_and_outputs_are_bound_to_memory_of_ours():
    """No copy is in the time of these two, which would be ours alone to avoid."""
    model = convolution()
    for name in RUNTIMES[:2]:
        engine = engines.ENGINES[name]
        if engine.why_not() is None:
            session = engine.build(model, 1)
            (y,) = session.outputs()
            before = y.clone()
            model.contiguous[0].neg_()
            session.run()
            assert not torch.equal(y, before)
            model.contiguous[0].neg_()
            session.run()
            assert torch.equal(y, before)


def test_no_tool_of_mnn_is_imported():
    """Those install a package by pip and report to a logging service."""
    if engines.ENGINES["MNN"].why_not() is None:
        engines.sessions(convolution(), engines=[engines.ENGINES["MNN"]])
    assert not [name for name in sys.modules if name.startswith("MNN.tools")]
    assert "MNN.tools" not in mnn.CONVERT


@pytest.mark.slow
def test_a_module_is_exported():
    layer = nn.GRU(8, 16).eval()
    arguments = {"input": torch.randn(5, 2, 8), "hx": torch.randn(1, 2, 16)}
    model = engines.Model.of(layer, arguments)
    assert "GRU" in model.operators
    assert len(model.names[0]) == 2
    truth = model.truth()
    found = engines.sessions(model, truth, engines=[engines.ENGINES["onnxruntime"]])
    assert found.measured["onnxruntime"].error < 1e-6


@pytest.mark.slow
def test_torch_compile():
    model = convolution()
    found = engines.sessions(
        model, model.truth(), engines=[engines.ENGINES["torch.compile max-autotune"]]
    )
    (measured,) = found.measured.values()
    assert measured.pytorch
    assert measured.error < 1e-5


class TestSessions:
    model = engines.Model(nn.Identity(), (torch.randn(3),))

    def test_each_engine_runs_or_says_why_not(self):
        right, failing = Fake("right"), Fake("failing", failing="no such operator")
        some = [right, failing, Fake("wrong", scale=1.5), Fake("absent", absent="not installed")]
        with timing.threads(1):
            found = engines.sessions(self.model, self.model.truth(), engines=some)
        assert right.threads == [1]
        assert set(found.calls()) == {"right"}
        assert found.measured["right"] == engines.Measured("1.2", pytest.approx(0), False)
        assert found.missing == {
            "failing": "RuntimeError: no such operator",
            "wrong": "its results are off by 5.0e-01: not the same model",
            "absent": "not installed",
        }

    def test_a_compiler_is_left_out(self):
        engine = Fake("slow to build")
        engine.compiles = True
        found = engines.sessions(self.model, compiled=False, engines=[engine])
        assert found.missing == {"slow to build": "compiling was left out"}

    def test_an_engine_that_is_not_installed(self):
        class Absent(Fake):
            package, module = "no-such-engine", "no_such_engine"
            why_not = engines.Engine.why_not

        found = engines.sessions(self.model, engines=[Absent("absent")])
        assert found.missing == {"absent": "not installed: pip install no-such-engine"}


class TestErrors:
    def test_relative_error(self):
        truth = [torch.tensor([1.0, -4.0]).double(), torch.tensor([1])]
        assert engines.relative_error([torch.tensor([1.0, -3.0]), truth[1]], truth) == 0.25
        assert engines.relative_error([torch.tensor([[1.0], [-4.0]]), truth[1]], truth) == 0
        assert engines.relative_error([torch.tensor([np.nan, -4.0]), truth[1]], truth) == math.inf
        assert engines.relative_error([torch.tensor([1.0]), truth[1]], truth) == math.inf
        assert engines.relative_error([], truth) == math.inf

    def test_an_error_of_many_times_ours_is_named(self):
        assert engines.remark(3.5e-3, 4.9e-6) == "714 times our error"
        assert engines.remark(1e-6, 4.9e-7) == ""
        assert engines.remark(None, 4.9e-7) == ""
        assert errors.NAMED == 100


class TestZenTorch:
    engine = zentorch.ZenTorch()

    @pytest.fixture
    def installed(self, monkeypatch, tmp_path):
        """A package of that name, which registers nothing."""
        monkeypatch.syspath_prepend(tmp_path)

        def put(version, isa="avx512", works=True):
            code = f"class _C:\n    is_avx512_supported = staticmethod(lambda: {works})\n"
            (tmp_path / "zentorch.py").write_text(code)
            monkeypatch.delitem(sys.modules, "zentorch", raising=False)
            monkeypatch.setattr(processor, "best_isa", lambda cpuinfo: isa)
            monkeypatch.setattr(zentorch.ZenTorch, "version", lambda self: version)

        return put

    def test_what_it_needs(self, installed):
        minor = ".".join(torch.__version__.split(".")[:2])
        installed(f"{minor}.0.2")
        assert self.engine.why_not() is None
        installed("1.0.0.1")
        assert f"pip install zentorch=={minor}.*" in self.engine.why_not()
        installed(f"{minor}.0.2", isa="avx2")
        assert "without AVX-512" in self.engine.why_not()

    @pytest.mark.parametrize("works", [True, False])
    def test_what_it_says_of_the_cpu_is_believed(self, works, installed):
        installed("1.0", works=works)
        model = engines.Model(nn.ReLU(), (-torch.ones(2),))
        reason = None if works else "it does nothing on this CPU"
        assert self.engine.refuses(model) == reason

    def test_its_backend_of_torch_compile_runs(self, installed, monkeypatch):
        compiled = []

        def compile_by(function, **options):
            compiled.append(options)
            return function

        installed("1.0")
        monkeypatch.setattr(torch, "compile", compile_by)
        session = self.engine.build(engines.Model(nn.ReLU(), (-torch.ones(2),)), 1)
        assert torch.equal(session.outputs()[0], torch.zeros(2))
        assert compiled == [{"dynamic": False, "mode": None, "backend": "zentorch"}]


def test_calls_that_settle_are_not_timed():
    calls = []
    sampled = []

    def sampler(call, loops):
        sampled.append(len(calls))
        return 1e7

    timing.interleave(
        {"form": lambda: calls.append(0)},
        0,
        min_rounds=2,
        max_rounds=2,
        sampler=sampler,
        settle_seconds=1e-3,
    )
    first, second = sampled[-2:]
    assert second > first > 0
