"""What tests of chains share."""

import pytest

from mbm_kernels.ops.conv_bias_act.op import convolve


@pytest.fixture
def runs(monkeypatch):
    """The options of each call of conv_bias_act by a chain."""
    from mbm_kernels.optimize import chain

    seen = []

    names = ("stride", "padding", "dilation", "groups", "activation", "max_pool")

    def watched(tensors, options, backend):
        given = dict(zip(names, options, strict=True))
        seen.append({**given, "residual": tensors[3], "backend": backend})
        return convolve(tensors, options, backend)

    monkeypatch.setattr(chain, "convolve", watched)
    return seen
