"""torch.export with a dynamic batch, and AOTInductor."""

import shutil

import pytest
import torch

from mbm_kernels import nn
from tests.tools.cases import ALL, Model, assert_same, each_case


@each_case
def test_a_dynamic_batch_is_one_graph(name):
    case = ALL[name]
    model = Model(case, "cpu").eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, case.inputs(4), dynamic_shapes=case.dynamic(batch))
    for size in (2, 9):
        inputs = case.inputs(size)
        assert_same(program.module()(*inputs), model(*inputs))


# Without optimisation, and without headers compiled for the models after it.
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}


class Recurrent(torch.nn.Module):
    """A convolution, a GRU and attention by kernels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ConvBiasAct(3, 8, 3, padding=1, activation="relu", backend="cpu")
        self.gru = nn.GRU(8, 8, num_layers=2, batch_first=True, backend="cpu")
        self.attention = nn.AdditiveAttention(8, 8, 8, backend="cpu")

    def forward(self, x):
        features = self.conv(x).flatten(2).transpose(1, 2)
        return self.attention(self.gru(features)[0], features)[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++")
def test_aot_inductor(tmp_path):
    model = Recurrent().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(4, 3, 4, 4),), dynamic_shapes=({0: batch},)
        )
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs=QUICK,
        )
        loaded = torch._inductor.aoti_load_package(path)
        for size in (2, 7):
            x = torch.randn(size, 3, 4, 4)
            torch.testing.assert_close(loaded(x), model(x))
