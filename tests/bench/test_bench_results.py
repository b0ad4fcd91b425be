"""mbm_kernels.bench: results files and their tables."""

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import BOTH, FORWARD, machine, results, table
from tests.conftest import raises


def row(**changes):
    return {
        "op": "gru",
        "case": "B1 T32",
        "pass": FORWARD,
        "dtype": "float32",
        "threads": 2,
        "heap": "warm",
        "backend": "cpu",
        "quick": False,
        "mbm_ms": 0.5,
        "stock_form": "eager",
        "stock_ms": 2.0,
        "ratio": 4.0,
        "ratio_lo": 3.9,
        "ratio_hi": 4.1,
        "verdict": "FAST",
        "n_processes": 5,
        "ratios": {"eager": 4.0, "compile": 5.0},
        "unavailable": {},
        "peak_extra_bytes": {"mbm": 3 * 2**20, "eager": None},
        "result_bytes": {"mbm": 2**20, "eager": 2**20},
        **changes,
    }


class TestResults:
    @pytest.fixture(autouse=True)
    def _no_out(self, monkeypatch):
        monkeypatch.delenv("OUT", raising=False)

    def test_round_trip_and_merge(self, tmp_path):
        commit = "0123456789abcdef"
        file = results.ResultsFile(tmp_path, commit, "2026-11-30")
        assert file.path == tmp_path / machine.device() / "2026-11-30-0123456.jsonl"
        assert file.rows() == []
        file.append(row())
        # Another operation, on another day, in another process: the same file.
        other = results.ResultsFile(tmp_path, commit, "2026-12-01")
        other.append(row(op="gru_cell"))
        file.append(row(heap="default"))
        file.append(row(mbm_ms=0.4))
        found = results.read(file.path)
        assert [(r["op"], r["heap"], r["mbm_ms"]) for r in found["rows"]] == [
            ("gru_cell", "warm", 0.5),
            ("gru", "default", 0.5),
            ("gru", "warm", 0.4),
        ]
        assert (found["schema"], found["commit"]) == (results.SCHEMA, commit)
        assert len(list(tmp_path.rglob("*"))) == 2

    def test_a_row_is_a_line(self, tmp_path):
        file = results.ResultsFile(tmp_path, "a" * 40, isa={"mbm": "avx2"})
        file.append(row())
        file.append(row(op="gru_cell"))
        head, *lines = map(json.loads, file.path.read_text().splitlines())
        assert (head["schema"], head["isa"]) == (results.SCHEMA, {"mbm": "avx2"})
        assert [line["op"] for line in lines] == ["gru", "gru_cell"]

    def test_a_row_worth_less_replaces_none(self, tmp_path):
        file = results.ResultsFile(tmp_path, "a" * 40)
        beside = {"engines": {}}
        assert file.append(row(ratio=4.0, **beside)) is None
        for less in ({"n_processes": 1}, {"doubts": ["p80 / p20 is 3"]}, {}):
            assert "more processes" in file.append(row(ratio=9.0, **less))
        assert [r["ratio"] for r in file.rows()] == [4.0]
        file.append(row(ratio=5.0, **beside))
        assert [r["ratio"] for r in file.rows()] == [5.0]
        wrong = {n: row().get(n) for n in results.KEY} | {"wrong": "error 1 over the budget"}
        assert file.append(wrong) is None
        assert "ratio" not in file.rows()[0]

    @pytest.mark.parametrize(("dirty", "compiled"), [(True, True), (False, False)])
    def test_local_runs_have_a_file_of_their_own(self, tmp_path, dirty, compiled):
        clean = results.ResultsFile(tmp_path, "a" * 40, "2026-11-30")
        clean.append(row(ratio=4.0))
        local = results.is_local(dirty, compiled)
        file = results.ResultsFile(tmp_path, "a" * 40, "2026-11-30", local=local)
        file.append(row(ratio=9.0))
        assert file.path.name == "2026-11-30-aaaaaaa-local.jsonl"
        assert clean.rows()[0]["ratio"] == 4.0
        again = results.ResultsFile(tmp_path, "a" * 40, "2026-12-01")
        assert again.path == clean.path
        assert not results.is_local(None, True)

    def test_losing_rows_of_a_named_backend_stay(self, tmp_path):
        file = results.ResultsFile(tmp_path, "a" * 40)
        file.append(row(backend="cpu", ratio=0.5))
        file.append(row(backend="torch", ratio=1.0))
        assert [r["ratio"] for r in file.rows()] == [0.5, 1.0]

    def test_out_and_no_commit(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
        file = results.ResultsFile(tmp_path / "base", None, "2026-11-30")
        assert file.path == tmp_path / "out" / "2026-11-30-nocommit.jsonl"
        file.append(row())
        assert results.read(file.path)["commit"] is None

    @pytest.mark.parametrize("stage", ["fsync", "replace"])
    def test_interrupted_write_leaves_the_old_file(self, tmp_path, monkeypatch, stage):
        path = tmp_path / "result.json"
        write_atomic(path, b"old")

        def stop(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(*((os, "fsync") if stage == "fsync" else (Path, "replace")), stop)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_foreign_files(self, tmp_path):
        path = tmp_path / "x.json"
        path.write_text('{"schema": 99}')
        with raises(ValueError, "got schema 99", "expected 1"):
            results.read(path)
        path.write_text('{"schema": 1, "ro')
        with raises(ValueError, "not JSON"):
            results.read(path)
        lines = path.with_suffix(".jsonl")
        for text in ('{"schema": 1}\n', '{"schema": 2}\n{"op"', "", "[]\n"):
            lines.write_text(text)
            with pytest.raises(ValueError, match=r"expected (2|a results file)"):
                results.read(lines)

    def test_older_files_are_read(self, tmp_path):
        path = tmp_path / "x.json"
        path.write_text(json.dumps({"schema": 1, "rows": [row()]}))
        assert results.read(path)["rows"] == [row()]


class TestTable:
    @pytest.mark.parametrize("width", [80, 100, 160])
    def test_nothing_is_cut_off(self, width):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        losing = row(ratio=0.5, ratio_lo=0.45, ratio_hi=0.55, verdict="SLOW", op="gru_cell")
        table.print_rows([row(), losing, row(**{"pass": BOTH}, heap="default")], console)
        text = console.export_text()
        assert "…" not in text
        for part in ("4.00x", "3.90-4.10", "0.50x", "0.45-0.55", "SLOW", "default heap", "fwd+bwd"):
            assert part in text
        assert ("compile 5.00x" in text) == (width >= table.WIDE)

    def test_wrong_rows_have_no_speed(self):
        console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        wrong = {n: row().get(n) for n in results.KEY} | {"wrong": "error 1 over the budget"}
        table.print_rows([wrong], console)
        line = console.export_text().splitlines()[2]
        assert "WRONG" in line
        assert "x " not in line

    def test_markdown_between_markers(self, tmp_path):
        file = results.ResultsFile(tmp_path / "results", "a" * 40)
        file.append(row())
        file.append(row(op="gru_cell", ratio=0.8, ratio_lo=0.7, ratio_hi=0.9))
        file.append(row(heap="default", ratio=9.0))
        file.append(row(threads=1, ratio=8.0))
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{table.BEGIN}\nstale\n{table.END}\nafter\n")
        for _ in range(2):
            table.update_readme(readme, results.read(file.path), file.path)
        text = readme.read_text()
        assert text.startswith(f"before\n{table.BEGIN}\n")
        assert text.endswith(f"{table.END}\nafter\n")
        assert "stale" not in text
        assert (
            "| gru | B1 T32 | forward | cpu | eager | 2 | 0.5 | 4.00 (3.90 to 4.10) | FAST |"
            in text
        )
        assert "0.80 (0.70 to 0.90)" in text
        assert "over 5 processes" in text
        assert "9.00" not in text
        assert "8.00" not in text
        assert f"results/{machine.device()}/{file.path.name}" in text

    def test_intervals_say_what_they_cover(self):
        assert "within one process" in table.interval([row(n_processes=1)])
        assert "over 5 processes and the rounds of each" in table.interval([row(), row()])
        mixed = table.interval([row(), row(n_processes=1)])
        assert "1-5 processes" in mixed
        assert "of the rows with 1" in mixed

    def test_shares_over_the_limit_are_not_shown(self):
        assert table._share(row(limit={"share": 1.7})) == ""
        assert table._share(row(limit={"share": 0.5})) == "50%"

    @pytest.mark.parametrize(
        "text", ["", table.BEGIN, table.END + table.BEGIN, (table.BEGIN + table.END) * 2]
    )
    def test_missing_markers(self, text):
        with raises(ValueError, "markers"):
            table.replace_between_markers(text, "new")


def test_a_study_goes_on_in_its_file_while_its_head_is_the_same(tmp_path):
    path = results.new_study(tmp_path, "zoo", go_on=True, threads=1)
    with path.open("a") as file:
        file.write("{}\n")
    assert results.new_study(tmp_path, "zoo", go_on=True, threads=1) == path
    assert len(path.read_text().splitlines()) == 2
    for changes in ({"threads": 2, "go_on": True}, {"threads": 2}):
        results.new_study(tmp_path, "zoo", **changes)
        assert len(path.read_text().splitlines()) == 1
