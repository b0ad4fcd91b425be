"""torch.export with a dynamic batch, and AOTInductor."""

import torch

from tests.tools.cases import ALL, Model, assert_same, each_backend, each_case


@each_backend
@each_case
def test_a_dynamic_batch_is_one_graph(name, backend):
    case = ALL[name]
    model = Model(case, backend).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, case.inputs(4), dynamic_shapes=case.dynamic(batch))
    for size in (2, 9):
        inputs = case.inputs(size)
        assert_same(program.module()(*inputs), model(*inputs))
