"""Forms of PyTorch that the benchmarks time beside the eager one."""

import pytest
import torch

from mbm_kernels.bench import FORWARD, frozen, holding
from mbm_kernels.bench.benchmark import prepare


@pytest.mark.slow
def test_freezing_folds_weights_in():
    def layers(x, weight, bias):
        return torch.relu(torch.conv2d(x, weight, bias))

    inputs = {"x": torch.randn(2, 16, 12, 12), "weight": torch.randn(16, 16, 3, 3)}
    inputs["bias"] = torch.randn(16)
    form = frozen(holding(layers, ("weight", "bias")))["compile freezing"]
    assert form.passes == (FORWARD,)
    prepared = prepare(form, inputs, ("x", "weight", "bias"))
    expected = layers(**inputs)
    torch.testing.assert_close(prepared.forward(), expected)
    with torch.no_grad():
        prepared.leaves["weight"].zero_()  # what was folded in is a constant
    torch.testing.assert_close(prepared.forward(), expected)
    with torch.no_grad():
        prepared.leaves["x"].zero_()  # the input is none, though it is a Parameter too
    torch.testing.assert_close(
        prepared.forward(), layers(0 * inputs["x"], inputs["weight"], inputs["bias"])
    )
