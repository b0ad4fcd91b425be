"""What tests of chains share."""

import pytest

import mbm_kernels


@pytest.fixture
def runs(monkeypatch):
    """The options of each call of conv_bias_act by a chain."""
    from mbm_kernels.optimize import chain

    seen = []

    def watched(*args, **options):
        seen.append(options)
        return mbm_kernels.conv_bias_act(*args, **options)

    monkeypatch.setattr(chain, "conv_bias_act", watched)
    return seen
