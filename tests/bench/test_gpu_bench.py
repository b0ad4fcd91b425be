"""What of the GPU's benchmarks needs no GPU: rows, tables, and the dispatch rules made of them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS
from mbm_kernels.bench import cli, dispatch_tables, results
from mbm_kernels.bench.benchmark import FORWARD, watch
from mbm_kernels.bench.dispatch_tables import Point, boxes, inside, points
from mbm_kernels.bench.exits import CannotMeasure
from mbm_kernels.bench.gpu import check, measure
from mbm_kernels.bench.limits import Work, in_dtype
from mbm_kernels.bench.model import MODELS, predict
from mbm_kernels.testing.suite import placed

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_summary_takes_the_best_of_each_side():
    times = {
        "mbm": np.full(9, 20e3),
        "mbm, graph": np.full(9, 10e3),
        "eager": np.full(9, 50e3),
        "eager, graph": np.full(9, 30e3),
        "compile": np.full(9, 40e3),
    }
    row = measure._summary(times, {"compile, graph": "synchronises"})
    assert (row["mbm_form"], row["stock_form"]) == ("mbm, graph", "eager, graph")
    assert row["ratio"] == pytest.approx(3.0)
    assert row["ratio_called"] == pytest.approx(2.0)  # compile, 40, over mbm as called, 20
    assert set(row["ratios"]) == {"eager", "eager, graph", "compile"}
    line = check.line(
        {
            **row,
            "op": "gru",
            "case": "B1",
            "pass": "forward",
            "dtype": "bfloat16",
            "backend": "triton",
        }
    )
    assert re.search(r"gru B1, forward, bfloat16, - +triton +0\.0100 +0\.0300 +3\.00 +2\.00", line)
    assert len(line.split("triton")[0]) == len(check.HEADER.split("backend")[0])


def test_rows_without_times_say_why():
    row = {"op": "gru", "case": "B1", "pass": "forward", "dtype": "bfloat16"}
    assert check.line({**row, "wrong": "x"}).endswith("WRONG")
    assert check.line({**row, "failed": "x"}).endswith("FAILED")


def test_rows_of_hot_and_cold_are_kept_apart(tmp_path):
    file = results.ResultsFile(tmp_path, "abcdefg", device="nvidia-test")
    for l2 in ("hot", "cold", "hot"):
        file.append({"op": "gru", "case": "B1", "l2": l2, "ratio": 1.0})
    assert sorted(row["l2"] for row in file.rows()) == ["cold", "hot"]
    assert file.path.parent.name == "nvidia-test"


@pytest.mark.parametrize(("name", "value"), [("STAGE", "everything"), ("OPS", "gru,lstm")])
def test_gpu_check_refuses_bad_settings(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="expected one of"):
        check.main([])
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="expected one of"):
        check.main([f"--{name.lower()}", value])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_check_says_that_there_is_no_gpu():
    with pytest.raises(CannotMeasure, match="torch sees no CUDA device"):
        check.main([])


def row(sizes, low, **rest):
    base = {"op": "gru", "backend": "triton", "dtype": "bfloat16", "pass": "forward"}
    return {**base, "dispatch_sizes": sizes, "ratio_lo": low, **rest}


def test_a_shape_wins_only_if_all_its_rows_do():
    found = points(
        [row({"B": 1}, 1.4, l2="hot"), row({"B": 1}, 0.9, l2="cold"), row({"B": 2}, 1.1)]
    )
    assert found == [Point((("B", 1),), False), Point((("B", 2),), True)]
    assert points([{**row({"B": 1}, 0), "wrong": "x"}]) == [Point((("B", 1),), False)]


def test_boxes_hold_every_winner_and_no_loser():
    generator = np.random.default_rng(0)
    for _ in range(50):
        shapes = {tuple(int(n) for n in generator.integers(1, 6, 3)) for _ in range(20)}
        measured = [
            Point(tuple(zip("BTH", shape, strict=True)), bool(generator.integers(2)))
            for shape in sorted(shapes)
        ]
        found = boxes(measured)
        for point in measured:
            assert any(inside(box, point) for box in found) == point.wins


def test_rules_are_what_dispatch_reads(tmp_path):
    (tmp_path / "gru").mkdir()
    path = tmp_path / "gru" / "dispatch.json"
    old = {"backend": "cpu", "device": "cpu", "dtypes": ["float32"], "results": "x.json"}
    stale = {"backend": "triton", "device": "cuda", "dtypes": ["float32"], "results": "y.json"}
    path.write_text(json.dumps({"rules": [old, stale]}))
    rows = [
        row({"B": 8, "H": 256}, 1.2),
        row({"B": 64, "H": 256}, 1.5),
        row({"B": 1, "H": 256}, 0.8),
    ]
    assert dispatch_tables.update("gru", rows, "results.json", tmp_path) == 1
    first, second = json.loads(path.read_text())["rules"]
    assert first == old
    rule = dispatch.Rule.parse(second)
    sizes = {"B": 32, "H": 256, "training": 0}
    assert rule.holds("cuda", "bfloat16", sizes)
    assert not rule.holds("cuda", "bfloat16", {**sizes, "B": 4})
    assert not rule.holds("cuda", "bfloat16", {**sizes, "training": 1})
    assert not rule.holds("cuda", "float32", sizes)


def write(path, *rows):
    path.write_text("\n".join(json.dumps(line) for line in ({"schema": results.SCHEMA}, *rows)))


def test_a_file_without_gpu_rows_makes_no_table(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, row({"B": 1}, 2, backend="cpu"))
    with pytest.raises(ValueError, match="without a row of triton or cuda"):
        dispatch_tables.main(path)


def test_models_make_no_rules(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    write(path, row({"B": 1}, 2), row({}, 2, op="captioner"))
    updated = []
    monkeypatch.setattr(dispatch_tables, "update", lambda op, *rest: updated.append(op))
    assert dispatch_tables.main(path) == 0
    assert updated == ["gru"]


def test_rules_name_the_sizes_that_dispatch_judges_by():
    """Not the letters of a benchmark's case: a rule of another name could not be read."""
    (benchmark,) = cli.load(BENCHMARKS, ["conv_bias_act"])
    case = next(c for c in benchmark.cases if c.quick)
    watched = watch(benchmark, case, FORWARD, "cpu")
    assert watched.backends == {"conv_bias_act": "cpu"}
    sizes = watched.sizes["conv_bias_act"]
    for rule in dispatch._tables["conv_bias_act"].rules:
        rule.holds("cpu", "float32", "avx2", {**sizes, "training": 0})


def test_inputs_keep_their_strides_when_they_move():
    x = torch.arange(24.0).reshape(2, 3, 4)
    inputs = {
        "x": x.transpose(0, 2),
        "y": x[:, 1:2].expand(2, 3, 4),
        "key_lengths": torch.tensor([1]),
    }
    moved = placed(inputs, torch.device("meta"))
    for name in ("x", "y"):
        assert moved[name].stride() == inputs[name].stride()
        assert moved[name].device.type == "meta"
    assert moved["key_lengths"] is inputs["key_lengths"]


def test_prediction_takes_the_slowest_unit():
    model = MODELS["h100"]
    work = Work(operations=989e9, bytes=3.35e9, special=0.0)
    assert model.seconds(work, torch.bfloat16) == pytest.approx(
        {"memory": 1e-3, "arithmetic": 1e-3, "special functions": 0.0}
    )
    assert in_dtype(work, torch.bfloat16).bytes == 3.35e9 / 2
    (benchmark,) = cli.load(BENCHMARKS, ["additive_attention"])
    rows = predict([benchmark], model, "B64 T20 S196 D512 E512", ["bfloat16"])
    # 64 * 20 * 196 * 512 / 2 reciprocals at 3.71e12 a second are 17.3 us.
    assert rows[0][2:4] == ["17.3", "special functions"]


@pytest.mark.parametrize("measured", cli.load(BENCHMARKS), ids=lambda b: b.op)
def test_gpu_cases_are_well_formed(measured):
    models = {"two_tower", "multimodal"}  # assembled of operations that have cases of their own
    no_kernel = measured.op in OPS and "triton" not in dispatch._tables[measured.op].backends
    needed = measured.op not in models and not no_kernel
    assert measured.gpu_cases or not needed
    labels = [case.label for case in measured.gpu_cases]
    assert len(set(labels)) == len(labels)
    assert any(case.quick for case in measured.gpu_cases) or not needed
    for case in measured.gpu_cases:
        assert set(case.sizes) == set(measured.cases[0].sizes)
        for which in case.passes:  # what --model predicts from
            assert measured.work(case, which).bytes > 0
