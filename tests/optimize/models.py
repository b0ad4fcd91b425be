"""Small models as their authors write them, in stock PyTorch, and what compares them."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import mbm_kernels
from mbm_kernels.optimize.fused import PLAN
from mbm_kernels.optimize.sequence import Sequence


class Block(nn.Module):
    """A residual block; its relu runs twice."""

    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 32, 2))
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer1(x).mean((2, 3)))


class GRUClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.gru = nn.GRU(8, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, words):
        y, _ = self.gru(self.embedding(words))
        return self.head(self.cell(y[:, -1]))


class Functional(nn.Module):
    """Activations, pools and sums as functions; returns two tensors by name."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.third = nn.Conv2d(8, 8, 1)

    def forward(self, x, scale=1.0):
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        y = F.hardswish(self.second(x) + x)
        return {"y": y * scale, "z": F.gelu(self.third(y), approximate="tanh")}


def warmed(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and scales that a BatchNorm has after training."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return model.eval()


def state(model: nn.Module):
    """All that the instance of each module holds, by identity."""
    return {name: (m, type(m), dict(vars(m))) for name, m in model.named_modules()}


def assert_same_objects(model: nn.Module, before) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for name, (module, kind, content) in after.items():
        assert module is before[name][0]
        assert kind is before[name][1]
        assert content.keys() == before[name][2].keys()
        for key, value in content.items():
            assert value is before[name][2][key], f"{name}.{key}"


class OfBlocks(nn.Module):
    """A forward written in a test, of modules given by name."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def conv(channels=4, **options):
    return nn.Conv2d(channels, 4, 3, padding=1, **options)


CALLS = 5  # of `check`: own forward, chains one by one, sequences


def check(model, *inputs, chains=None):
    """Optimizes, compares with the model before in float64, and returns the report."""
    warmed(model)
    truth = copy.deepcopy(model).double()
    doubled = [x.double() for x in inputs]
    with torch.no_grad():
        expected, stock = truth(*doubled), model(*inputs)
        report = mbm_kernels.optimize(model)
        fused = [row for row in report.replaced if row.now == "mbm_kernels.conv_bias_act"]
        assert chains is None or len(fused) == chains, str(report)
        for _ in range(CALLS):
            found = model(*inputs)
        for ours, exact, theirs in zip(*map(leaves, (found, expected, stock)), strict=True):
            limit = 2 * (theirs - exact).abs().max() + 1e-5 * exact.abs().max()
            assert (ours - exact).abs().max() <= limit
    return report


def leaves(value):
    return list(value.values()) if isinstance(value, dict) else [value]


def optimized(model, x, runs=4, **options):
    """The model, every chain by "cpu", called until its sequences are ready."""
    report = mbm_kernels.optimize(model, policy="always", sample_input=x, **options)
    with torch.no_grad():
        for _ in range(runs):
            model(x)
    return report


def sequences(model):
    plan = vars(model)[PLAN]
    return [value for value in plan.attributes.values() if isinstance(value, Sequence)]
