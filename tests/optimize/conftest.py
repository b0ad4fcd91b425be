"""What tests of chains share."""

import pytest

from mbm_kernels.ops.conv_bias_act.op import convolve
from mbm_kernels.optimize import sequence


@pytest.fixture
def runs(monkeypatch):
    """The options of each call of conv_bias_act by a chain; no native call runs several."""
    from mbm_kernels.optimize import chain

    seen = []

    names = ("stride", "padding", "dilation", "groups", "activation", "max_pool")

    def watched(tensors, options, backend):
        given = dict(zip(names, options, strict=True))
        seen.append({**given, "residual": tensors[3], "backend": backend})
        return convolve(tensors, options, backend)

    monkeypatch.setattr(chain, "convolve", watched)
    monkeypatch.setattr(sequence._Ready, "made", lambda *_: None)
    return seen


@pytest.fixture
def calls(monkeypatch):
    """How many sequences ran in one native call, as a function."""
    counted = []
    right = sequence._Ready.run

    def run(self, given):
        counted.append(self)
        return right(self, given)

    monkeypatch.setattr(sequence._Ready, "run", run)

    def count():
        found = len(counted)
        counted.clear()
        return found

    return count
