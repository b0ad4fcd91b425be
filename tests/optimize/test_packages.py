"""Classes of timm and torchvision that chains know by name, here as small stand-ins of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optimize.models import CALLS, OfBlocks, check, conv, optimized, warmed


def named(module: str):
    """Makes a class look as one of a package's module."""

    def rename(kind):
        kind.__module__, kind.__qualname__ = module, kind.__name__
        return kind

    return rename


@named("timm.layers.norm_act")
class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels, act=None, drop=None):
        super().__init__(channels)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@named("torchvision.ops.misc")
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.5), ("bias", 0.25), ("running_mean", 0.5)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)


@named("timm.layers.activations")
class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def of(norm, **options):
    return nn.Sequential(conv(3, bias=False, **options), norm)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("norm", "was"),
    [
        (BatchNormAct2d(4), "Conv2d + BatchNormAct2d + ReLU"),
        (BatchNormAct2d(4, Swish()), "Conv2d + BatchNormAct2d + SiLU"),
        (BatchNormAct2d(4, nn.Identity()), "Conv2d + BatchNormAct2d"),
        (BatchNormAct2d(4, nn.SiLU(), nn.Dropout(0.5)), "Conv2d + BatchNormAct2d + SiLU"),
        (FrozenBatchNorm2d(4), "Conv2d + FrozenBatchNorm2d"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_norms(norm, was, runs):
    report = check(of(norm), X, chains=1)
    assert [row.was for row in report.replaced] == [was]
    assert len(runs) == CALLS


def test_a_residual_behind_a_norm_without_an_activation():
    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + x)

    model = OfBlocks(forward, conv=conv(), norm=BatchNormAct2d(4, nn.Identity()))
    report = check(model, torch.randn(2, 4, 8, 8), chains=1)
    assert report.replaced[0].was == "Conv2d + BatchNormAct2d + add + ReLU"


@pytest.mark.parametrize(
    "norm",
    [BatchNormAct2d(4, nn.Softplus()), BatchNormAct2d(4, nn.LeakyReLU(0.2))],
    ids=["unknown", "another slope"],
)
def test_a_norm_is_taken_with_all_it_calls_or_not_at_all(norm):
    check(of(norm), X, chains=0)
    check(nn.Sequential(*of(norm), nn.MaxPool2d(2)), X, chains=0)


def test_a_filter_that_keeps_the_activation_keeps_the_norm():
    model = warmed(of(BatchNormAct2d(4)))
    report = optimized(model, X, filter_fn=lambda name, module: name != "1.act")
    assert not any("BatchNormAct2d" in row.was for row in report.replaced)


def replaced(norm):
    norm.act = nn.Tanh()


def hooked(norm):
    norm.act.register_forward_hook(lambda module, args, y: y + 1)


def scaled(norm):
    norm.weight.data.mul_(2)


def dropped(norm):
    norm.drop.train()


@pytest.mark.parametrize("change", [replaced, hooked, scaled, dropped])
def test_a_change_of_what_a_norm_calls_is_seen(change):
    model = warmed(of(BatchNormAct2d(4, drop=nn.Dropout(1.0))))
    optimized(model, X)
    change(model[1])
    expected = model[1](F.conv2d(X, model[0].weight, padding=1))
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)
