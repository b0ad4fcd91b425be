"""MBM_AUTOTUNE's choice of a configuration, with stand-ins for its timer and the launch."""

import pytest
import torch

from mbm_kernels._core import triton_launch

pytest.importorskip("triton")
from triton import testing

SMALL = {"B": 1, "T": 3, "S": 8, "D": 16, "E": 16}


@pytest.fixture
def timed(monkeypatch):
    """Runs of each configuration; the last that is tried is the fastest."""
    runs = []

    def do_bench(run, return_mode):
        run()
        return 1.0 / len(runs)

    def launch(kernel, config, grid, args, constexprs):
        if config.num_warps == 99:
            raise RuntimeError("out of resource: shared memory")
        runs.append((config, args))
        args[0].zero_()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(triton_launch.Kernel, "_run", launch)
    return runs


def kernel(op, name):
    made = triton_launch.kernel(op, name)
    return triton_launch.Kernel(op, name, made.function)


def tuned(kernel, x, sizes, *allocated_by, **constexprs):
    default = kernel.config(x.dtype, sizes)
    return kernel._tuned(default, None, (x, 3), constexprs, x.dtype, sizes, allocated_by)


def test_the_fastest_runs_from_then_on(timed):
    x = torch.ones(6)[::2]
    found = tuned(kernel("additive_attention", "attend"), x, SMALL)
    assert [config for config, _ in timed] == list(kernel("additive_attention", "attend").configs)
    assert found == timed[-1][0]
    assert x.eq(1).all(), "timing must not change what the call reads"
    assert timed[0][1][0].stride() == x.stride()


def test_each_set_of_sizes_and_constants_is_timed_once(timed):
    attend = kernel("additive_attention", "attend")
    x, count = torch.ones(3), len(attend.configs)
    for _ in range(2):
        tuned(attend, x, SMALL)
        tuned(attend, x, SMALL, FAST=True)
        tuned(attend, x, {**SMALL, "S": 9})
    assert len(timed) == 3 * count


def test_memory_that_was_allocated_holds(timed):
    """grad_terms writes SPLIT parts of its results, allocated before the launch."""
    terms = kernel("additive_attention", "grad_terms")
    assert len({dict(c.constants)["SPLIT"] for c in terms.configs}) > 1
    for positions, split in ((8, 1), (100, 2)):
        timed.clear()
        tuned(terms, torch.ones(3), {**SMALL, "S": positions}, "SPLIT")
        assert {dict(config.constants)["SPLIT"] for config, _ in timed} == {split}


def test_of_another_dtype_or_beyond_the_device_none_is_taken(timed, monkeypatch):
    tiles = kernel("linear_topk", "tiles")
    sizes = {"R": 4, "H": 8, "V": 16, "k": 1}
    tuned(tiles, torch.ones(3), sizes)
    assert all("bfloat16" not in config.dtypes for config, _ in timed)
    default = tiles.config(torch.float32, sizes)
    huge = triton_launch.Config((), 99, 1, None, (), (), "")
    monkeypatch.setattr(triton_launch.Kernel, "configs", (huge, default))
    assert tuned(kernel("linear_topk", "tiles"), torch.ones(3), sizes) == default


def test_nothing_is_timed_in_a_capture(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    attend = kernel("additive_attention", "attend")
    assert tuned(attend, torch.ones(3), SMALL) == attend.config(torch.float32, SMALL)
    assert not timed
