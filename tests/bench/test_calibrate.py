"""What the studies print of timed problems, and the README's picture."""

import dataclasses
import json

import pytest

from benchmarks import plot_ratios, study_dispatch
from mbm_kernels._core import cost
from mbm_kernels.bench import calibrate
from mbm_kernels.bench.drawn_times import Timed

CELL = {"B": 2, "C": 8, "H": 16}
UNITS = {"cpu": {"rows few": {"weights_whole": 1.0}}, "torch": {"rows few": {"calls": 1500.0}}}


@pytest.fixture
def table():
    return cost.Table(
        "test",
        {"lanes": 8, "near_cache": 1 << 19, "cache": 1 << 25},
        {"gru_cell": {"inference": UNITS}},
        {"gru_cell": {"inference": {"rows few": 1.1}}},
    )


def timed(cpu: float, pytorch: float, **sizes: int) -> Timed:
    """The kernel is predicted to take 3 H (C + H) ns, PyTorch 1500."""
    return Timed("gru_cell", "", False, 1, {**CELL, **sizes}, cpu, pytorch, pytorch)


def test_quality_counts_what_auto_loses(table):
    rows = [
        timed(2e5, 4e5),  # 1152 ns predicted: the kernel is taken, and rightly so
        timed(4e5, 3e5),  # taken, wrongly: PyTorch has 0.75 of its time
        timed(1e5, 2e5, H=32),  # 3840 ns predicted: not taken, wrongly
        timed(3e5, 2e5, H=32),  # not taken, rightly
    ]
    (found,) = calibrate.quality(rows, table).values()
    assert (found["problems"], found["kernel_wins"], found["taken"]) == (4, 0.5, 0.5)
    assert found["regret"] == pytest.approx((2e5 + 4e5 + 2e5 + 2e5) / (2e5 + 3e5 + 1e5 + 2e5) - 1)
    assert (found["least_ratio"], found["below"]) == (0.75, 1)
    assert found["over_torch"] == pytest.approx((4e5 + 3e5 + 2e5 + 2e5) / 1e6)


def test_a_row_survives_its_file(tmp_path):
    path, row = tmp_path / "rows.jsonl", timed(1, 2)
    path.write_text(json.dumps({"device": "x"}) + "\n" + json.dumps(row.as_dict()) + "\n")
    assert calibrate.read_rows(path) == [row]


def test_study_prints_each_pass(table):
    rows = [timed(2e5, 4e5), dataclasses.replace(timed(2e5, 1e5), training=True)]
    columns = [list(column.cells) for column in study_dispatch.report(rows, table).columns]
    assert columns[0] == ["gru_cell", "gru_cell"]
    assert columns[1] == ["inference", "training"]
    assert columns[5] == ["0.0%", "0.0%"]
    assert "| `gru_cell` | 2.00 | 1.00 | 0.0% |" in study_dispatch.markdown(rows, table)


def test_picture_of_the_rows(tmp_path):
    constants = sorted(cost.FOLDER.glob("*.json"))
    path, out = tmp_path / "rows.jsonl", tmp_path / "ratios.svg"
    head = {"device": constants[0].stem}
    rows = [timed(1e5, 2e5, H=16 + i).as_dict() for i in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *rows)))
    plot_ratios.main(path, out)
    first = out.read_bytes()
    assert first.startswith(b"<?xml")
    plot_ratios.main(path, out)
    assert out.read_bytes() == first
