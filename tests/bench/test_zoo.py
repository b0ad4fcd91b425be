"""The zoo's rows: right forms, and no time of a model that is wrong."""

import pytest
import torch

from benchmarks import zoo, zoo_models
from mbm_kernels._core import timing
from mbm_kernels.optimize import measure
from tests.bench.engines import Fake, fakes  # noqa: F401

SMALL = zoo_models.Entry(
    "small",
    lambda: zoo_models.StreamingGru(bands=8, channels=8, hidden=16),
    zoo_models._drawn((1, 1, 8), (2, 16), batch_dim=(0, 1)),
    images=False,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SAMPLE_NS", 1)
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "WHOLE_SECONDS", 0.0)


@pytest.mark.parametrize("mode", zoo.MODES)
def test_a_row_has_every_form_and_the_its_ratios(mode):
    row = zoo.measure(SMALL, 2, mode, compiled=False, seconds=0.01)
    ours = zoo.FORMS if mode == "inference" else zoo.POLICIES  # nothing is frozen in training
    assert set(row["ms"]) == {"torch NCHW", *(f"{form} NCHW" for form in ours)}
    assert row["parity"] == "ok"
    row["ms"] = {"torch NCHW": 6.0, "torch channels_last": 4.0, "auto NCHW": 2.0, "measured x": 8.0}
    assert zoo.ratios(row) == {"auto": 2.0, "measured": 0.5}
    row["ms"]["frozen NCHW"] = 1.0
    assert zoo.ratios(row) == {"auto": 2.0, "measured": 0.5, "frozen": 4.0}


def test_engines_run_the_model_as_it_was(fakes):
    fakes(Fake("first"), Fake("slow", seconds=0.005), Fake("wrong", scale=2.0))
    row = zoo.measure(SMALL, 1, "inference", compiled=False, seconds=0.01, peers=True)
    forms = {f"{form} NCHW" for form in ("torch", *zoo.FORMS)}
    assert set(row["ms"]) == {*forms, "first", "slow"}
    assert "not the same model" in row["no_engines"]["wrong"]
    name, ratio = zoo.engine(row)
    assert ratio == row["ms"][name] / row["ms"]["frozen NCHW"]
    assert zoo.cells(row)[-1] == f"{name} {ratio:.2f}"
    del row["ms"]["frozen NCHW"]  # a row from before there was that
    assert zoo.engine(row) == (name, row["ms"][name] / row["ms"]["auto NCHW"])
    assert zoo.cells(row)[-2] == ""


def test_no_time_is_taken_of_a_wrong_model(monkeypatch):
    monkeypatch.setattr(zoo, "parity", lambda entry, mode: "head: 1e-3")
    row = zoo.measure(SMALL, 1, "inference", compiled=False, seconds=0.01)
    assert "ms" not in row
    assert zoo.cells(row)[-1] == "head: 1e-3"


@pytest.mark.parametrize("entry", zoo_models.OWN, ids=lambda entry: entry.name)
def test_models_written_here_take_their_inputs(entry):
    with torch.no_grad(), timing.threads(1):  # two would meet at each of 2048 steps
        found = zoo.first(entry.make().eval()(*entry.inputs(3)))
    assert 3 in found.shape
