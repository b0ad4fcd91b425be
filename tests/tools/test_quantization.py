"""torch.ao.quantization changes torch's own classes alone: ours say so, and reverted are those."""

import copy
import warnings

import pytest
import torch
from torch import nn as stock
from torch.ao import quantization

import mbm_kernels
from mbm_kernels import nn

pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
SAID = r"mbm_kernels\.nn\.{} stays in floating point; call report\.revert\(\) first"


def words(call):
    """What `call` warns of by the default filters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        call()
    return [str(w.message) for w in caught if "stays in floating point" in str(w.message)]


class Net(stock.Module):
    def __init__(self):
        super().__init__()
        self.conv = stock.Conv2d(3, 4, 3)
        self.norm = stock.BatchNorm2d(4)
        self.act = stock.ReLU()
        self.gru = stock.GRU(4, 5, batch_first=True)

    def forward(self, x):
        return self.gru(self.act(self.norm(self.conv(x))).flatten(2).transpose(1, 2))[0]


@pytest.fixture
def swapped():
    model = Net().eval()
    return model, mbm_kernels.optimize(model, mode="training")


def dynamic(model):
    return quantization.quantize_dynamic(model, {stock.Linear, stock.GRU})


def static(model):
    model.qconfig = quantization.get_default_qconfig("x86")
    return quantization.prepare(model)


def test_dynamic_warns_of_what_it_would_have_changed(swapped):
    model, report = swapped
    (said,) = words(lambda: dynamic(model))
    assert "nn.GRU stays" in said
    assert type(model.gru) is nn.GRU
    report.revert()
    assert not words(lambda: dynamic(model))
    assert type(dynamic(model).gru) is not stock.GRU


def test_one_warning_for_a_class():
    model = stock.Sequential(*(nn.GRU(4, 4) for _ in range(3)))
    assert len(words(lambda: dynamic(model))) == 1


def test_static_warns_and_runs_in_floating_point(swapped):
    model, _ = swapped
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    said = words(lambda: static(model))
    assert {s.split("mbm_kernels.nn.")[1].split()[0] for s in said} == {"Conv2d", "GRU"}
    torch.testing.assert_close(model(x), expected)


def test_fuse_modules_refuses_ours_and_fuses_after_revert(swapped):
    model, report = swapped
    names = [["conv", "norm", "act"]]
    with pytest.raises((AssertionError, NotImplementedError), match="fuse"):
        quantization.fuse_modules(model, names)
    report.revert()
    x = torch.randn(2, 3, 8, 8)
    fused = quantization.fuse_modules(model, names)
    torch.testing.assert_close(fused(x), model(x))


def test_the_mark_is_an_attribute_like_others():
    module = nn.Conv2d(3, 4, 3)
    assert not hasattr(module, "qconfig")
    module.qconfig = None  # of a class that dynamic quantization does not know: no warning
    assert copy.deepcopy(module).qconfig is None
    del module.qconfig
    assert not hasattr(module, "qconfig")
