"""What torch does to modules, for those swapped by `optimize` and those written directly."""

import copy
import pickle

import pytest
import torch
from torch import nn as stock
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import mbm_kernels
from mbm_kernels import nn
from tests.tools.cases import assert_same

KINDS = {
    "Conv2d": ((3, 4, 3), lambda: (torch.randn(2, 3, 6, 6),)),
    "GRU": ((3, 4, 2), lambda: (torch.randn(5, 2, 3),)),
    "GRUCell": ((3, 4), lambda: (torch.randn(2, 3), torch.randn(2, 4))),
    "MultiheadAttention": ((8, 2), lambda: (torch.randn(5, 2, 8),) * 3),
}


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


@pytest.fixture(params=["swapped", "direct"])
def module(request, name):
    args, _ = KINDS[name]
    if request.param == "direct":
        return getattr(nn, name)(*args, backend="cpu")
    model = stock.Sequential(getattr(stock, name)(*args))
    mbm_kernels.optimize(model, mode="training", policy="always")
    assert type(model[0]) is getattr(nn, name)
    return model[0]


@pytest.fixture
def inputs(name):
    return KINDS[name][1]()


def first(result):
    return result[0] if isinstance(result, tuple) else result


def gradients(module, inputs):
    return torch.autograd.grad(first(module(*inputs)).sin().sum(), list(module.parameters()))


def a_weight(module):
    return next(name for name, _ in module.named_parameters() if "weight" in name)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copies(module, inputs, copied):
    other = copied(module)
    assert type(other) is type(module)
    assert other.backend == module.backend
    assert_same(other(*inputs), module(*inputs), rtol=0, atol=0)


def test_hooks(module, inputs):
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    inputs = [x.requires_grad_() for x in inputs]
    first(module(*inputs)).sum().backward()
    assert seen == ["before", "after", "backward"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.nn.utils.weight_norm
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, stock.utils.weight_norm])
def test_weight_norm(module, inputs, norm):
    expected = module(*inputs)
    norm(module, a_weight(module))
    assert_same(module(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert all(grad.abs().max() > 0 for grad in gradients(module, inputs)[:2])


class Doubled(stock.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrize(module, inputs):
    expected, name = copy.deepcopy(module), a_weight(module)
    with torch.no_grad():
        expected.get_parameter(name).mul_(2)
    parametrize.register_parametrization(module, name, Doubled())
    assert_same(module(*inputs), expected(*inputs))


def test_functional_call(module, inputs):
    values = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    expected = copy.deepcopy(module)
    expected.load_state_dict(values)
    assert_same(torch.func.functional_call(module, values, inputs), expected(*inputs))


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_ensemble(module, inputs):
    modules = [copy.deepcopy(module) for _ in range(3)]
    for each in modules:
        for parameter in each.parameters():
            stock.init.normal_(parameter, std=0.3)
    stacked, buffers = torch.func.stack_module_state(modules)
    base = copy.deepcopy(module).to("meta")

    def loss(parameters, buffers):
        y = torch.func.functional_call(base, (parameters, buffers), inputs)
        return first(y).sin().sum(), first(y)

    found, y = torch.vmap(torch.func.grad(loss, has_aux=True))(stacked, buffers)
    for i, each in enumerate(modules):
        torch.testing.assert_close(y[i], first(each(*inputs)))
        for (key, _), grad in zip(each.named_parameters(), gradients(each, inputs), strict=True):
            torch.testing.assert_close(found[key][i], grad, rtol=1e-4, atol=1e-5)


def test_meta_initialisation(module, name, inputs):
    with torch.device("meta"):
        made = getattr(nn, name)(*KINDS[name][0], backend="cpu")
    made.load_state_dict(module.state_dict(), assign=True)
    assert_same(made(*inputs), module(*inputs), rtol=0, atol=0)
    assert_same(gradients(made, inputs), gradients(module, inputs), rtol=0, atol=0)


def test_checkpoint(module, inputs):
    def run(*args):
        return checkpoint(module, *args, use_reentrant=False)

    found = torch.autograd.grad(first(run(*inputs)).sin().sum(), list(module.parameters()))
    assert_same(found, gradients(module, inputs), rtol=0, atol=0)


def test_swapped_parameters(module, inputs):
    """Of weights whose packed forms are kept, to which there are weak references."""
    with torch.no_grad():
        expected = first(module(*inputs))
    twice = {name: 2 * value for name, value in module.state_dict().items()}
    other = copy.deepcopy(module)
    other.load_state_dict(twice)
    ids = [id(p) for p in module.parameters()]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double().float()
        with torch.no_grad():
            torch.testing.assert_close(first(module(*inputs)), expected)
        module.load_state_dict(twice)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert [id(p) for p in module.parameters()] == ids
    assert_same(module(*inputs), other(*inputs), rtol=0, atol=0)
    assert_same(gradients(module, inputs), gradients(other, inputs), rtol=0, atol=0)
