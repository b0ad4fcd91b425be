"""torch.profiler and FlopCounterMode: what each operation shows of itself."""

import pytest
from torch.profiler import profile

from mbm_kernels._core import profiling
from mbm_kernels._core.op import OPS
from tests.tools.cases import FUNCTIONS, Model, each_backend


@pytest.mark.parametrize("needs_grad", [False, True])
@each_backend
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_is_one_event_with_shapes(name, backend, needs_grad):
    case, op = FUNCTIONS[name], name.split()[0]
    model, inputs = Model(case, backend), case.inputs(3)
    for x in inputs:
        x.requires_grad_(needs_grad and x.is_floating_point())
    for _ in range(2):  # a first call of its kind, and one that is known
        with profile(record_shapes=True) as recorded:
            model(*inputs)
        events = recorded.key_averages(group_by_input_shape=True)
        ours = {e.key: e for e in events if e.key.startswith("mbm_kernels::")}
        assert set(ours) == {f"mbm_kernels::{op}", f"mbm_kernels::{op}.{backend}"}
        for event in ours.values():
            assert event.count == 1
            assert list(inputs[-1].shape) in event.input_shapes


@each_backend
@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_a_profiler_no_event_is_made(name, backend, monkeypatch):
    def fail(*args):
        raise AssertionError

    monkeypatch.setattr(profiling, "event", fail)
    Model(FUNCTIONS[name], backend)(*FUNCTIONS[name].inputs(3))


def test_every_operation_has_a_formula():
    """OpSuite compares each with the stock form's count."""
    assert [name for name, op in OPS.items() if op.products is None] == []
