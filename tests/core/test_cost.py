"""Cost models: their fit, where constants come from, and that "auto" goes by them."""

import json
import random

import numpy as np
import pytest
import torch

import mbm_kernels
from mbm_kernels._core import cost, dispatch, native, processor
from mbm_kernels.bench import calibrate, cost_fit, drawn, drawn_times

CELL = [torch.zeros(*shape) for shape in ((2, 8), (2, 16), (48, 8), (48, 16))]
MACHINE = {"lanes": 8, "near_cache": 512 << 10, "cache": 32 << 20}


def content(cpu: float, pytorch: float, margin: float = 1.1, **changes):
    """A file of constants by which a call of gru_cell takes so many nanoseconds."""
    kernels = {b: {"rows few": {"calls": t}} for b, t in (("cpu", cpu), ("torch", pytorch))}
    return {
        "schema": cost.SCHEMA,
        "device": "somewhere",
        "isa": "avx2",
        "date": "2026-01-01",
        "rates": {"operations": 1e11, "bytes": 1e10},
        "problems": {},
        "constants": {"gru_cell": {"inference": kernels}},
        "margins": {"gru_cell": {"inference": {"rows few": margin}}},
        **changes,
    }


@pytest.fixture
def constants(monkeypatch):
    """Puts a file's content in force."""

    def put(found):
        table = cost.of_content(found, "test")
        monkeypatch.setattr(cost, "table", lambda: table)
        dispatch.forget_choices()

    yield put
    dispatch.forget_choices()


def chosen() -> str:
    with dispatch.watched() as seen, torch.no_grad():
        mbm_kernels.gru_cell(*CELL)
    return seen[0]


def test_least_squares_finds_the_least_of_all_signs():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.normal(size=(12, 4)), rng.normal(size=12)
        found = cost_fit.least_squares(x, y)
        best = np.inf
        for subset in range(16):  # the least over c >= 0 is the plain least over some columns
            columns = [i for i in range(4) if subset >> i & 1]
            c = np.zeros(4)
            c[columns] = np.linalg.lstsq(x[:, columns], y, rcond=None)[0]
            if (c >= 0).all():
                best = min(best, np.sum((x @ c - y) ** 2))
        assert (found >= 0).all()
        assert np.sum((x @ found - y) ** 2) == pytest.approx(best)


def test_fit_returns_the_constants_that_made_the_times():
    rng = np.random.default_rng(0)
    amounts = [
        {"calls": 1.0, "products": float(10 ** rng.uniform(2, 8)), "unused": 0.0} for _ in range(60)
    ]
    times = np.array([900 + 0.02 * row["products"] for row in amounts])
    noisy = times * np.exp(rng.normal(0, 0.05, size=60))
    assert cost_fit.fitted(amounts, times) == pytest.approx({"calls": 900, "products": 0.02})
    assert cost_fit.fitted(amounts, noisy) == pytest.approx(
        {"calls": 900, "products": 0.02}, rel=0.1
    )


@pytest.mark.parametrize("op", drawn.DRAWS)
def test_work_of_drawn_problems_is_finite_and_names_kernels(op):
    rng, model = random.Random(1), cost.work_of(op)
    for count in range(8):
        problem = drawn.draw(op, rng, count % 2 == 1)
        sizes = drawn_times.sizes_of(op, problem.call()("cpu"))
        for threads in (1, 3):
            for backend in cost.BACKENDS:
                work = getattr(model, backend)({**sizes, **MACHINE, "threads": threads})
                assert work.kernel
                assert work.amounts["calls"] == 1
                assert all(np.isfinite(x) and x >= 0 for x in work.amounts.values())


@pytest.mark.parametrize("op", drawn.DRAWS)
def test_the_same_seed_draws_the_same_problems(op):
    labels = [
        [drawn.draw(op, rng, True).label for _ in range(3)]
        for rng in (random.Random(7), random.Random(7))
    ]
    assert labels[0] == labels[1]


@pytest.mark.parametrize(
    ("cpu", "pytorch", "expected"),
    [(100, 120, "cpu"), (100, 108, "torch"), (100, 90, "torch")],  # the margin is 1.1
)
def test_auto_takes_the_least_predicted_time(constants, cpu, pytorch, expected):
    constants(content(cpu, pytorch))
    assert chosen() == expected


def test_auto_is_torch_where_nothing_was_measured(constants):
    constants(content(1, 100, constants={}))
    assert chosen() == "torch"


def test_the_users_own_constants_come_first(monkeypatch, tmp_path):
    monkeypatch.setenv("MBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cost, "FOLDER", tmp_path / "package")
    name = f"{processor.name()}.json"
    try:
        dispatch.reload()
        assert cost.table() is None
        calibrate.write(cost.FOLDER / name, content(100, 1))
        assert chosen() == "torch"
        calibrate.write(cost.user_folder() / name, content(1, 100))
        assert chosen() == "cpu"
        assert "calibrated on this machine" in cost.table().source
        calibrate.write(cost.user_folder() / name, content(1, 100, schema=cost.SCHEMA + 1))
        assert chosen() == "torch"  # a file of another version counts as absent
    finally:
        monkeypatch.undo()
        dispatch.reload()


def test_another_machines_constants_are_scaled_by_both_rates(monkeypatch):
    monkeypatch.setattr(processor, "rates", lambda: processor.Rates(4e11, 2e10))
    units = {"calls": 1000.0, "products": 1.0, "weights_beyond_cache": 1.0}
    theirs = content(1, 1, constants={"op": {"inference": {"cpu": {"k": units}}}})
    found = cost.scaled(theirs, lanes=16)["constants"]["op"]["inference"]["cpu"]["k"]
    assert found == {"calls": 500.0, "products": 0.25, "weights_beyond_cache": 0.5}


def test_no_kernel_is_taken_unasked_without_avx2(monkeypatch):
    monkeypatch.setattr(native, "isa", lambda: "baseline")
    cost.reload()
    try:
        assert cost.table() is None
    finally:
        monkeypatch.undo()
        cost.reload()


@pytest.mark.parametrize("path", sorted(cost.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_package_constants_are_whole(path):
    found = json.loads(path.read_text())
    assert found["schema"] == cost.SCHEMA
    assert found["device"] == path.stem
    assert found["isa"] in cost.LANES
    assert set(found["constants"]) == set(found["margins"]) == set(drawn.DRAWS)
    for op, passes in found["constants"].items():
        for which, backends in passes.items():
            assert set(backends) == set(cost.BACKENDS)
            assert all(margin > 1 for margin in found["margins"][op][which].values())
            for kernels in backends.values():
                for units in kernels.values():
                    assert units, (op, which)
                    assert all(np.isfinite(x) and x > 0 for x in units.values())


@pytest.mark.parametrize("path", sorted(cost.FOLDER.glob("*.json")), ids=lambda p: p.stem)
@pytest.mark.parametrize("teacher", ["hidden", "logits", "topk"])
def test_constants_know_every_source_of_a_teacher(path, teacher):
    hidden, weight, logits = torch.ones(4, 8), torch.ones(16, 8), torch.zeros(4, 16).log_softmax(-1)
    given = {
        "hidden": {"teacher_hidden": hidden, "teacher_weight": weight},
        "logits": {"teacher_logits": logits},
        "topk": {"teacher_topk": logits.topk(2)[::-1]},
    }
    target, op = torch.zeros(4, dtype=torch.int64), "linear_distillation_loss"
    table = cost.of_content(json.loads(path.read_text()), "test")
    for training in (0, 1):
        sizes = drawn_times.sizes_of(
            op,
            lambda: mbm_kernels.linear_distillation_loss(hidden, weight, target, **given[teacher]),
        )
        assert table.predict(op, {**sizes, "training": training}, 1) is not None


def test_explain_says_what_runs_and_why(constants):
    constants(content(100_000, 104_000))
    with torch.no_grad():
        found = mbm_kernels.explain("gru_cell", *CELL)
    (row,) = found.rows
    assert (row.op, row.backend) == ("gru_cell", "torch")
    assert row.predicted_ms == {"cpu": 0.1, "torch": 0.104}
    assert row.why_not["cpu"] == "predicted 1.04x of PyTorch, taken from 1.10x"
    assert "predicted 1.04x" in str(found)
    assert json.loads(found.to_json())["rows"][0]["backend"] == "torch"


def test_explain_refuses_an_unknown_operation():
    with pytest.raises(ValueError, match=r"op: got 'convolution'; expected one of"):
        mbm_kernels.explain("convolution")


@pytest.mark.slow
def test_calibrate_writes_what_auto_then_goes_by(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from mbm_kernels.bench.calibrate_cli import calibrate as command

    app = __import__("typer").Typer()
    app.command()(command)
    out, keep = tmp_path / "constants.json", tmp_path / "rows.jsonl"
    arguments = ["--op", "linear_topk", "--seconds", "5", "--out", str(out), "--keep", str(keep)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert set(found["constants"]) == {"linear_topk"}
    assert found["problems"]["linear_topk"] == len(keep.read_text().splitlines())
    again = tmp_path / "again.json"
    result = CliRunner().invoke(app, ["--rows", str(keep), "--out", str(again)])
    assert result.exit_code == 0, result.output
    assert json.loads(again.read_text())["constants"] == found["constants"]
    result = CliRunner().invoke(app, ["--op", "convolution"])
    assert result.exit_code == 2
    dispatch.reload()
