"""What the study of sequences reports, and that its steps compute what single calls do."""

import json
from dataclasses import asdict

import torch
import typer
from typer.testing import CliRunner

from benchmarks import study_sequences
from mbm_kernels._core import cost


class Said(cost.Table):
    """Predicts what the sizes say."""

    def predict(self, op, sizes, threads):
        return cost.Predicted(sizes["cpu"], sizes["torch"], 1.5, sizes["call"])


TABLE = Said("test", {}, {}, {})


def row(batch, step, torch_ns, cpu, call=0):
    sizes = {"B": batch, "cpu": cpu, "torch": torch_ns, "call": call}
    return study_sequences.Row("", 1, sizes, step, step + call, torch_ns)


def test_each_rule_has_its_column():
    rows = [row(1, 50, 100, 80), row(2, 100, 70, 100), row(32, 100, 100, 1000)]
    columns = [list(c.cells) for c in study_sequences.report(rows, TABLE).columns]
    _batch, problems, wins, among, single, always, never = columns
    assert problems == ["2", "3"]
    assert wins == ["50%", "33%"]
    assert among == ["0.0%", "0.0%"]
    assert single == ["41.7%", "22.7%"]  # 50 more of 120, and of 220
    assert always == ["25.0%", "13.6%"]
    assert never == ["41.7%", "22.7%"]


def test_measures_drawn_convolutions(monkeypatch, tmp_path):
    monkeypatch.setattr(study_sequences, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(study_sequences, "MIN_ROUNDS", 1)
    rows = list(study_sequences.measured(7, 3))
    assert [r.threads for r in rows] == [torch.get_num_threads(), 1, torch.get_num_threads()]
    assert all(min(r.step_ns, r.call_ns, r.torch_ns) > 0 for r in rows)
    assert all(r.sizes["B"] > 0 for r in rows)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["{}", *(json.dumps(asdict(r)) for r in rows)]))
    monkeypatch.setattr(cost, "table", lambda: TABLE)
    monkeypatch.setattr(Said, "predict", lambda *_: cost.Predicted(1.0, 2.0, 1.0))
    app = typer.Typer()
    app.command()(study_sequences.main)
    found = CliRunner().invoke(app, ["--rows", str(path)])
    assert found.exit_code == 0, found.output
    assert "time lost in sequences" in found.output
