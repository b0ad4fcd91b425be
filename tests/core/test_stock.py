"""Modules whose choice is PyTorch: recognised, and recognised no more when anything changes."""

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels._core import dispatch, native, problem
from mbm_kernels._core.stock import StockCalls
from mbm_kernels.optimize import optimize

needs_cpu = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
OPS = ("conv_bias_act", "gru", "gru_cell", "cross_attention", "concat_linear")


def cases():
    steps = torch.randn(3, 2, 8)
    return {
        "Conv2d": ((4, 4, 3), (torch.randn(2, 4, 6, 6),)),
        "Conv1d": ((4, 4, 3), (torch.randn(2, 4, 9),)),
        "GRU": ((8, 8), (steps,)),
        "GRUCell": ((8, 8), (steps[0], steps[1])),
        "MultiheadAttention": ((8, 2), (steps, steps, steps)),
    }


def pair(name, **options):
    arguments, inputs = cases()[name]
    stock, ours = getattr(torch.nn, name)(*arguments), getattr(nn, name)(*arguments, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours, inputs


def tensors(found):
    return [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]


def backends_of(module, inputs) -> set[str]:
    with dispatch.watched() as taken:
        module(*inputs)
    return set(taken)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", cases())
class TestServed:
    def test_results_and_gradients_are_stocks(self, name, grad, torch_wins):
        stock, ours, inputs = pair(name)
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                expected, actual = tensors(stock(*inputs)), tensors(ours(*inputs))
                for a, e in zip(actual, expected, strict=True):
                    assert torch.equal(a, e)
                    assert a.stride() == e.stride()
                    assert (a.grad_fn is None) == (e.grad_fn is None)
                    assert a.grad_fn is None or a.grad_fn.name() == e.grad_fn.name()
        if grad:
            wanted = torch.autograd.grad(expected[0].sum(), list(stock.parameters()))
            found = torch.autograd.grad(actual[0].sum(), list(ours.parameters()))
            assert all(torch.equal(a, e) for a, e in zip(found, wanted, strict=True))

    @needs_cpu
    def test_what_changes_the_choice_acts_at_once(self, name, grad, torch_wins, monkeypatch):
        _, ours, inputs = pair(name)
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                ours(*inputs)
                assert backends_of(ours, inputs) == {"torch"}
                assert ours._stock_calls.find is not None
                with dispatch.preferring("cpu"):
                    for _ in range(2):
                        ours(*inputs)
                    assert "cpu" in backends_of(ours, inputs)
                    with mbm_kernels.disabled():
                        assert backends_of(ours, inputs) <= {"torch"}
                assert backends_of(ours, inputs) == {"torch"}
                ours.backend = "cpu"
                assert "cpu" in backends_of(ours, inputs)
                ours.backend = "auto"
            monkeypatch.setenv("MBM_BACKEND", "cpu")
            assert "cpu" in backends_of(ours, inputs)

    def test_it_is_known_and_copies_know_nothing(self, name, grad, torch_wins):
        _, ours, inputs = pair(name)
        with torch.set_grad_enabled(grad):
            expected = tensors(ours(*inputs))
            assert len(ours._stock_calls._known) == (1 if problem._guards_hold() else 0)
            for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
                assert isinstance(twin._stock_calls, StockCalls)
                assert not twin._stock_calls._known
                for a, e in zip(tensors(twin(*inputs)), expected, strict=True):
                    assert torch.equal(a, e)


@pytest.mark.parametrize("name", cases())
def test_under_tools(name, torch_wins):
    """After calls that are known: autocast, forward-mode derivatives, hooks, vmap, compilation."""
    stock, ours, inputs = pair(name)
    stock.eval(), ours.eval()
    for _ in range(2):
        ours(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for a, e in zip(tensors(ours(*inputs)), tensors(stock(*inputs)), strict=True):
            assert a.dtype == e.dtype
    seen = []
    handle = ours.register_forward_hook(lambda *given: seen.append(given))
    ours(*inputs)
    handle.remove()
    assert len(seen) == 1
    if name.startswith("Conv"):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
            tangent = forward_ad.unpack_dual(ours(dual)).tangent
            assert torch.equal(tangent, forward_ad.unpack_dual(stock(dual)).tangent)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for a, e in zip(tensors(compiled(*inputs)), tensors(ours(*inputs)), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", cases())
def test_optimize_swaps_and_restores(name, torch_wins):
    stock, _, inputs = pair(name)
    before = dict(vars(stock))
    report = optimize(stock, mode="training")
    stock(*inputs)
    assert type(stock) is getattr(nn, name)
    report.revert()
    assert type(stock) is getattr(torch.nn, name)
    assert vars(stock).keys() == before.keys()
