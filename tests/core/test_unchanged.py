"""What a Watch sees."""

import gc
import weakref

import pytest
import torch
from torch import nn

from mbm_kernels._core import native
from mbm_kernels._core.unchanged import Watch


def _replaced(m):
    m._modules["0"] = nn.ReLU()


def _added(m):
    m.append(nn.ReLU())


def _hook(m):
    m[0].register_forward_hook(lambda *args: None)


def _backward_hook(m):
    m[0].register_full_backward_hook(lambda *args: None)


def _forward(m):
    m[0].forward = lambda x: x


def _class(m):
    m[0].__class__ = type("Other", (nn.Conv2d,), {})


def _weight(m):
    m[0].weight = nn.Parameter(m[0].weight.detach())


def _bias(m):
    m[0].bias = None


def _stride(m):
    m[0].stride = (2, 2)


def _attribute(m):
    del m[0].groups


def _instance_dict(m):
    m[0].__dict__ = dict(vars(m[0]), stride=(2, 2))


CHANGES = [_replaced, _added, _hook, _backward_hook, _forward, _class, _weight, _bias, _stride]


def watch(model):
    made = Watch()
    made.items(model._modules, model._modules)
    made.size(model._modules)
    made.module(model[0], "stride", "groups")
    made.items(model[0]._parameters, ("weight", "bias"))
    return made


@pytest.mark.parametrize("change", [*CHANGES, _attribute, _instance_dict])
def test_sees(change):
    model = nn.Sequential(nn.Conv2d(2, 2, 1))
    made = watch(model)
    assert made.same()
    model(torch.zeros(1, 2, 2, 2))
    model.to(torch.float64)  # parameters stay the same objects
    assert made.same()
    change(model)
    assert not made.same()


def test_keeps_nothing_from_being_collected():
    model = nn.Sequential(nn.Conv2d(2, 2, 1))
    model.watch = watch(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_unknown_look():
    for look, owner in (("shape", {}), ("item", 3)):
        with pytest.raises(ValueError, match=f"look: got {look}; expected type, attribute"):
            native.cpu().Unchanged().add(look, owner, "a", None, False, 0)
