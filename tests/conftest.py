import functools
import gc
import os

# Before torch is imported: a thread that spins at a barrier takes the core of another worker, for
# three times as long in all on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Inductor would start a process beside each that compiles, which imports torch for Triton's sake.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
import typer

if not torch.cuda.is_available():
    # Before triton is imported: its kernels then run on CPU tensors, one program after another.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    collect_ignore = ["gpu"]  # what is there needs the hardware

from mbm_kernels._core import cost, dispatch, native, timing
from mbm_kernels.testing import grid, interpreter

if not torch.cuda.is_available():
    interpreter.leave_out_repeated_work()
_build_command = typer.main.get_command


@functools.cache
def _command(app: typer.Typer, commands: int, groups: int):
    return _build_command(app)


# A call of an app builds all of its commands anew, which takes longer than most of them run.
typer.main.get_command = lambda app: _command(
    app, len(app.registered_commands), len(app.registered_groups)
)


def pytest_collection_finish() -> None:
    """What is imported and collected stays: each collection of garbage would look through it, for
    half a second before each form that is timed."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    grid.generate(metafunc)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Of models that are too small for two threads: their steps meet too often.
ONE_THREAD = ("tests/captioning/", "tests/models/", "tests/retrieval/")


@pytest.fixture(autouse=True)
def _one_thread(request):
    """Beside Triton's interpreter too, which has one: others would spin between its steps, for half
    as much time again."""
    name = request.node.nodeid
    interpreted = "triton" in name and not torch.cuda.is_available()
    alone = interpreted or name.startswith(ONE_THREAD)
    with timing.threads(1 if alone else torch.get_num_threads()):
        yield


@pytest.fixture(params=native.isas())
def isa(request):
    """Each CPU code path that this build and CPU run, in turn."""
    before = native.cpu().isa()
    native.cpu().set_isa(request.param)
    yield request.param
    native.cpu().set_isa(before)


@pytest.fixture
def each_isa():
    """Iterates over these code paths, where one expectation holds for all."""
    before = native.cpu().isa()

    def paths():
        for name in native.isas():
            native.cpu().set_isa(name)
            yield name

    yield paths
    native.cpu().set_isa(before)


@pytest.fixture
def predictions(monkeypatch):
    """Lets a function of (op, sizes) say what the constants predict: whether the kernel wins.

    What earlier tests set by set_backend does not hold meanwhile.
    """

    def put(kernel_wins) -> None:
        class Said(cost.Table):
            def predict(self, op, sizes, threads):
                return cost.Predicted(1.0, 2.0 if kernel_wins(op, sizes) else 0.5, 1.1)

        table = Said("test", {}, {}, {})
        monkeypatch.setattr(cost, "table", lambda: table)
        monkeypatch.setattr(dispatch, "_defaults", {})
        dispatch.forget_choices()

    yield put
    dispatch.forget_choices()


@pytest.fixture
def torch_wins(predictions):
    """ "auto" takes PyTorch everywhere."""
    predictions(lambda op, sizes: False)


def raises(error: type[Exception], *fragments: str):
    """pytest.raises whose message holds each fragment (a regular expression), in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(f"(?:{f})" for f in fragments))


def precise(backend: str) -> torch.dtype:
    """The most precise dtype that every backend's kernels take."""
    return torch.float64 if backend == "torch" else torch.float32


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of the coarser dtype."""
    torch.testing.assert_close(actual, expected, check_dtype=False)
