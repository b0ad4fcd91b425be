"""torch.onnx.export of every operation and module, run by ONNX Runtime."""

import warnings

import pytest
import torch

import mbm_kernels
from tests.tools.cases import ALL, FUNCTIONS, Model, flat

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX packages: pip install '.[onnx]'")
pytest.importorskip("onnxscript", reason="ONNX packages: pip install '.[onnx]'")


class Several(torch.nn.Module):
    """Cases in one model: an export takes 3 s before it looks at any."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.models = torch.nn.ModuleList(Model(ALL[name], "cpu") for name in names)

    def forward(self, *tensors):
        results, rest = [], list(tensors)
        for model in self.models:
            count = len(model.case.batch)
            results += flat(model(*rest[:count]))
            rest = rest[count:]
        return results

    def inputs(self, batch):
        return tuple(x for name in self.names for x in ALL[name].inputs(batch))

    def dynamic(self):
        batch = torch.export.Dim("batch", min=2, max=64)
        return (tuple(axes for name in self.names for axes in ALL[name].dynamic(batch)[0]),)


def run(program, tensors):
    """The program's results by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    named = {i.name: x.numpy() for i, x in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, named)]


def exported(model, args, **options):
    with warnings.catch_warnings():  # torch's own
        warnings.simplefilter("ignore")
        return torch.onnx.export(model, args, dynamo=True, verbose=False, **options)


def assert_runs(program, model):
    for batch in (2, 9):
        tensors = model.inputs(batch)
        with torch.no_grad():
            expected = model(*tensors)
        for a, e in zip(run(program, tensors), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_operation():
    model = Several((*FUNCTIONS, "GRU", "MultiheadAttention")).eval()
    program = exported(model, model.inputs(4), dynamic_shapes=model.dynamic())
    operators = [node.op_type for node in program.model.graph]
    assert {node.domain for node in program.model.graph} == {""}
    assert operators.count("GRU") == 2 + 2  # two functions, two layers of nn.GRU
    assert operators.count("Conv") == 1
    assert_runs(program, model)


@pytest.mark.slow
def test_a_program_made_before():
    model = Several(("conv_bias_act", "gru", "linear_cross_entropy")).eval()
    program = torch.export.export(model, model.inputs(4), dynamic_shapes=model.dynamic())
    assert "mbm_kernels" in str(program.graph)
    program = program.run_decompositions(mbm_kernels.onnx.decompositions())
    assert "mbm_kernels" not in str(program.graph)
    assert_runs(exported(program, ()), model)
