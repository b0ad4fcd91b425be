"""mbm_kernels.bench: no speed without a right result; the benchmarks of this repository."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mbm_kernels
from mbm_kernels.bench import (
    BOTH,
    FORWARD,
    Benchmark,
    Case,
    Form,
    Work,
    as_called,
    cli,
    correct,
    harness,
    isa,
    limits,
    machine,
    processes,
    results,
    samples,
    statistics,
    table,
)
from mbm_kernels.bench.benchmark import prepare
from mbm_kernels.engines import flat, relative_error
from tests.bench.engines import Fake, fakes  # noqa: F401
from tests.conftest import raises

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
OPS = [path.stem.removeprefix("bench_") for path in sorted(BENCHMARKS.glob("bench_*.py"))]
FAST = harness.Settings(threads=(1,), seconds=0.02, min_rounds=3, compile=False)

ISAS = {"mbm": "avx2"} | {name: {"isa": "avx2"} for name in isa.LIBRARIES}


def options(folder, **changes):
    given = {"quick": True, "threads": [1], "seconds": 0.02, "no_compile": True}
    return cli.Options(folder, results_folder=folder, **given | changes)


def make(case, generator):
    b, t, s, d = (case.sizes[letter] for letter in "BTSD")
    return {
        "query": torch.randn(b, t, d, generator=generator),
        "key": torch.randn(b, s, d, generator=generator),
        "value": torch.randn(b, s, d, generator=generator),
        "v": torch.randn(d, generator=generator),
    }


def stock_form(query, key, value, v):
    weights = (torch.tanh(query[:, :, None] + key[:, None]) @ v).softmax(-1)
    return weights @ value, weights


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def wrong_forward(inputs):
    return (lambda query, **rest: stock_form(query * 1.0001, **rest)), inputs


def wrong_gradient(inputs):
    return (lambda query, **rest: stock_form(WrongGradient.apply(query), **rest)), inputs


def benchmark_of(function=None, stock=stock_form, case=None):
    return Benchmark(
        op="additive_attention",
        cases=[case or Case({"B": 2, "T": 3, "S": 5, "D": 8}, quick=True)],
        make=make,
        stock=lambda case: {"eager": Form(as_called(stock))},
        work=lambda case, which: Work(1e3, 1e3),
        function=function,
    )


class TestHarness:
    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch):
        monkeypatch.setattr(limits, "measure", lambda threads: limits.Limits(1e9, 1e9))
        monkeypatch.setattr(isa, "record", lambda: ISAS)

    def test_rows(self):
        benchmark = benchmark_of()
        settings = harness.Settings(threads=(2, 1), seconds=0.01, min_rounds=3, backend="torch")
        found = list(harness.run(benchmark, benchmark.cases, settings))
        assert [(r["pass"], r["threads"]) for r in found] == [
            (FORWARD, 2),
            (FORWARD, 1),
            (BOTH, 2),
            (BOTH, 1),
        ]
        for r in found:
            assert json.loads(json.dumps(r)) == r
            assert (r["backend"], r["stock_form"]) == ("torch", "eager")
            assert 0 < r["ratio_lo"] <= r["ratio"] <= r["ratio_hi"]
            assert 0 <= r["error_of_budget"] <= 1
            assert r["limit"]["share"] == pytest.approx(1e-6 / (r["mbm_ms"] * 1e-3))

    @pytest.mark.parametrize(
        ("function", "right"), [(wrong_forward, ()), (wrong_gradient, (FORWARD,))]
    )
    def test_wrong_kernel_yields_no_speed(self, function, right, tmp_path, capsys):
        benchmark = benchmark_of(function)
        found = list(harness.run(benchmark, benchmark.cases, FAST))
        for r in found:
            assert ("wrong" not in r) == ("ratio" in r) == ("mbm_ms" in r) == (r["pass"] in right)
        assert cli.measure([benchmark], options(tmp_path)) == cli.EXIT_WRONG
        assert "over the budget" in capsys.readouterr().out
        (path,) = tmp_path.rglob("*.jsonl")
        assert "ratio" not in results.read(path)["rows"][-1]

    def test_stock_form_of_other_maths_is_refused(self):
        def other(query, key, value, v):
            return stock_form(query * 1.5, key, value, v)

        benchmark = benchmark_of(stock=other)
        with pytest.raises(correct.WrongResult, match="computes something else"):
            correct.check(benchmark, benchmark.cases[0], FORWARD)

    def test_smaller_check_uses_the_backend_that_is_timed(self, monkeypatch):
        case = Case({"B": 4, "T": 3, "S": 5, "D": 8}, check={"B": 1}, passes=(FORWARD,))
        checked = []
        monkeypatch.setattr(harness, "check", lambda *args: checked.append(args[3]) or {})
        with monkeypatch.context() as patch:
            select = mbm_kernels._core.dispatch.select

            def large_only(op, backend, device, dtype, sizes):
                assert sizes["B"] == 4
                return select(op, "torch", device, dtype, sizes)

            patch.setattr(mbm_kernels._core.dispatch, "select", large_only)
            (found,) = harness.run(benchmark_of(case=case), [case], FAST)
        assert checked == ["torch"]
        assert found["backend"] == "torch"

    def test_gradients_are_checked_away_from_kinks(self):
        def on_the_kink(case, generator):
            if generator.initial_seed() == 0:
                return {"x": torch.full((4,), 1e-12)}
            return {"x": torch.randn(4, generator=generator)}

        benchmark = Benchmark(
            op="relu",
            cases=[Case({"B": 4})],
            make=on_the_kink,
            stock=lambda case: {"eager": Form(lambda i: (lambda x: torch.relu(x - 1e-12), i))},
            function=lambda inputs: (lambda x: torch.relu(x - 1e-12), inputs),
            reference=lambda x: torch.relu(x - 1e-12),
            diff=("x",),
            kinks=True,
        )
        found = correct._inputs(benchmark, benchmark.cases[0], BOTH)
        assert torch.equal(found["x"], benchmark.inputs(benchmark.cases[0], 1)["x"])
        assert correct._inputs(benchmark, benchmark.cases[0], FORWARD)["x"][0] == 1e-12

    def test_best_stock_form_is_the_fastest(self):
        def slow(**inputs):
            time.sleep(0.005)
            return stock_form(**inputs)

        benchmark = benchmark_of()
        forms = {"slow": Form(as_called(slow)), "fast": Form(as_called(stock_form))}
        object.__setattr__(benchmark, "stock", lambda case: forms)
        found = next(harness.run(benchmark, benchmark.cases, FAST))
        assert found["stock_form"] == "fast"
        assert found["ratios"]["slow"] > found["ratios"]["fast"] == found["ratio"]

    def test_form_that_does_not_compile_says_why(self, monkeypatch):
        def fails(function, **options):
            def compiled(**inputs):
                raise RuntimeError("no compiler\nlong story")

            return compiled

        monkeypatch.setattr(torch, "compile", fails)
        benchmark = benchmark_of()
        forms = {
            "eager": Form(as_called(stock_form)),
            "compile": Form(as_called(stock_form), compile=True),
        }
        object.__setattr__(benchmark, "stock", lambda case: forms)
        settings = harness.Settings(threads=(1,), seconds=0.01, min_rounds=3)
        found = next(harness.run(benchmark, benchmark.cases, settings))
        assert found["unavailable"] == {"compile": "RuntimeError: no compiler"}

    def test_a_stop_loses_no_row(self, tmp_path, monkeypatch):
        monkeypatch.delenv("OUT", raising=False)

        def rows(*args, **named):
            yield dict.fromkeys(results.KEY) | {"wrong": "stopped here"}
            raise KeyboardInterrupt

        monkeypatch.setattr(harness, "run", rows)
        with pytest.raises(KeyboardInterrupt):
            cli.measure([benchmark_of()], options(tmp_path))
        (path,) = tmp_path.rglob("*.jsonl")
        assert len(results.read(path)["rows"]) == 1

    def test_unknown_case(self, tmp_path):
        with raises(ValueError, "case: got 'B99'", "B2 T3 S5 D8"):
            cli.measure([benchmark_of()], cli.Options(tmp_path, quick=True, case="B99"))

    def test_another_isa_is_measured_by_nobody(self, tmp_path, monkeypatch):
        other = {**ISAS, "aten": {"isa": "avx512"}}
        monkeypatch.setattr(isa, "record", lambda: other)
        with raises(ValueError, "isa: got mbm runs avx2, ATen avx512", "expected one ISA"):
            cli.measure([benchmark_of()], options(tmp_path))
        assert not list(tmp_path.rglob("*.jsonl"))

    def test_rows_in_doubt_are_written_by_force_alone(self, tmp_path, monkeypatch, capsys):
        monkeypatch.delenv("OUT", raising=False)
        monkeypatch.setattr(harness, "doubts", lambda row, found: ["eager: p80 / p20 is 3.0"])
        assert cli.measure([benchmark_of()], options(tmp_path)) == 0
        assert "not written" in capsys.readouterr().out
        assert not list(tmp_path.rglob("*.jsonl"))
        cli.measure([benchmark_of()], options(tmp_path, force=True))
        (path,) = tmp_path.rglob("*.jsonl")
        assert {row["verdict"] for row in results.read(path)["rows"]} == {"AMBG"}

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"floor": 0.3}, "mbm beside itself differs by up to 30%"),
            ({"limit": {"share": 1.4, "bound": "memory"}}, "140% of the memory limit"),
            ({"forms": {"eager": {}}}, "eager: p80 / p20 is 4.0"),
        ],
    )
    def test_doubts(self, change, said):
        times = {"mbm": np.ones(10), "eager": np.repeat([1.0, 4.0], 5)}
        steady = harness.Sampled({"mbm": np.ones(10), "eager": np.ones(10)}, {}, 0.0, {}, {})
        one = harness.Sampled(times, {}, 0.0, {}, {})
        row = {"floor": 0.02, "forms": {"mbm": {}}, "limit": {"share": 0.9, "bound": "memory"}}
        assert harness.doubts(row, [steady, one]) == []
        (found,) = harness.doubts(row | change, [steady, one])
        assert found.startswith(said)

    def test_rows_of_processes(self):
        """A source of several: ratios over all of them, memory of the first."""
        benchmark, seen = benchmark_of(), []

        def source(benchmark, case, which, settings):
            seen.append((case.label, which, torch.get_num_threads()))
            found = [
                harness.sample(benchmark, case, which, settings, seed=i, details=i == 0)
                for i in range(2)
            ]
            return [harness.Sampled.from_json(json.loads(json.dumps(f.as_json()))) for f in found]

        rows = list(harness.run(benchmark, benchmark.cases, FAST, source=source))
        assert seen == [("B2 T3 S5 D8", which, 1) for which in (FORWARD, BOTH)]
        for r in rows:
            assert r["n_processes"] == 2
            assert set(r["peak_extra_bytes"]) == {"mbm", "eager"}
            each = samples.unpack(r["samples"])
            assert set(each) == {"mbm", "mbm again", "eager"}
            assert [len(times) for times in each["mbm"]] == [3, 3]
            ratio = statistics.ratio_over(each["eager"], each["mbm"])
            assert ratio.value == pytest.approx(r["ratio"], rel=1e-3)
            assert json.loads(json.dumps(r)) == r

    def test_engines_in_the_same_rounds(self, fakes, tmp_path, capsys):
        fakes(
            Fake("fast", scale=1 + 1e-3),
            Fake("slow", seconds=0.003),
            Fake("compiler", pytorch=True),
            Fake("absent", absent="not installed"),
        )
        benchmark = replace(benchmark_of(), engine=lambda case: as_called(stock_form))
        settings = replace(FAST, peers=True)
        forward, both = harness.run(benchmark, benchmark.cases, settings)
        assert set(forward["engines"]) == {"fast", "slow", "compiler"}
        for found in forward["engines"].values():
            assert found["version"] == "1.2"
            assert 0 < found["ratio_lo"] <= found["ratio"] <= found["ratio_hi"]
        assert forward["engine"] == "fast"
        assert forward["engine_ratio"] == forward["engines"]["fast"]["ratio"]
        assert forward["engines"]["fast"]["error"] == pytest.approx(1e-3, rel=0.01)
        assert forward["engines"]["slow"]["ms"] > 3
        assert forward["no_engines"] == {"absent": "not installed"}
        assert set(forward["errors"]) == {"mbm", "eager"}
        # PyTorch under other options is on PyTorch's side.
        assert set(forward["forms"]) == {"mbm", "mbm again", "eager", "compiler"}
        assert set(forward["peak_extra_bytes"]) == {"mbm", "eager", "compiler"}
        assert {"fast", "slow"} <= samples.unpack(forward["samples"]).keys()
        assert both["engine"] is None
        assert both["no_engines"]["fast"] == "engines only infer"
        assert json.loads(json.dumps(forward)) == forward
        found = {"machine": machine.facts(), "device": "x", "commit": None, "isa": ISAS}
        text = table.markdown({**found, "rows": [forward | {"heap": "warm", "threads": 2}]}, "r")
        assert "| fast, " in text
        assert "times our error |" in text
        cli.measure([benchmark], options(tmp_path, peers=True))
        out = capsys.readouterr().out
        assert "no absent: not installed" in out
        assert "times our error" in out

    def test_a_case_that_no_engine_has(self, fakes):
        fakes(Fake("fast"))
        benchmark = benchmark_of()
        found = next(harness.run(benchmark, benchmark.cases, replace(FAST, peers=True)))
        assert found["no_engines"] == {"fast": "no engine has this operation"}
        assert found["engines"] == {}

    def test_engines_run_in_the_widest_isa(self, monkeypatch):
        monkeypatch.setenv("MBM_ISA", "baseline")
        with raises(ValueError, "peers: got MBM_ISA=baseline", "leave MBM_ISA or the engines out"):
            cli.Options(BENCHMARKS, peers=True).settings()

    def test_what_speaks_against_a_row_is_measured_again(self, monkeypatch):
        said = iter([["noise"], [], ["noise"], ["noise"]])
        monkeypatch.setattr(harness, "doubts", lambda row, found: next(said))
        settings = replace(FAST, attempts=2)
        benchmark = benchmark_of()
        first, second = harness.run(benchmark, benchmark.cases, settings)
        assert (first["doubts"], second["doubts"]) == ([], ["noise"])
        assert second["verdict"] == "AMBG"

    def test_published_rows_have_processes(self, tmp_path):
        settings = cli.Options(tmp_path, publish=True).settings()
        assert settings.processes == processes.LEAST
        assert settings.seconds == pytest.approx(0.6)
        with raises(ValueError, "processes: got 2", "at least 5 with --publish"):
            cli.Options(tmp_path, publish=True, processes=2).settings()
        assert cli.Options(tmp_path, processes=2).settings().processes == 2


class TestProcesses:
    @pytest.mark.slow
    def test_a_pool_times_a_case_in_each(self):
        (benchmark,) = cli.load(BENCHMARKS, ["gru_cell"])
        (case,) = benchmark.choose("tiny", quick=False)
        settings = replace(FAST, processes=2)
        with processes.Pool(BENCHMARKS, "gru_cell", 2) as pool:
            found = pool(benchmark, case, FORWARD, settings)
            again = pool(benchmark, case, BOTH, settings)
        assert [set(f.times) for f in (*found, *again)] == [{"mbm", "mbm again", "eager"}] * 4
        assert [bool(f.result_bytes) for f in found] == [True, False]
        assert not (found[0].times["mbm"] == found[1].times["mbm"]).all()

    def test_a_process_that_ends_says_so(self, tmp_path):
        (tmp_path / "bench_gone.py").write_text("import os; os._exit(7)")
        with (
            raises(ValueError, "gone: process 0 got status 7"),
            processes.Pool(tmp_path, "gone", 1),
        ):
            pass


class TestBenchmarks:
    def test_every_op_has_one(self):
        assert set(mbm_kernels.ops.PUBLIC) <= set(OPS)

    @pytest.mark.parametrize("op", OPS)
    def test_smallest_case_is_right(self, op):
        (benchmark,) = cli.load(BENCHMARKS, [op])
        case = random.Random(0).choice(benchmark.choose(None, quick=True))
        for which in case.passes:
            shares = correct.check(benchmark, case, which)
            assert shares
            assert max(shares.values()) <= 1

    @pytest.mark.parametrize("op", OPS)
    def test_what_engines_run_computes_the_same(self, op):
        """In PyTorch, as the definition does: an engine's model, or why there is none."""
        (benchmark,) = cli.load(BENCHMARKS, [op])
        case = benchmark.choose(None, quick=True)[0].for_check(FORWARD)
        model = benchmark.engine_model(case)
        if isinstance(model, str):
            assert "engine" in model
            return
        with torch.no_grad():
            theirs = model.module(*model.inputs)
        inputs = benchmark.inputs(case)
        definition = Form(as_called(benchmark.definition()))
        ours = prepare(definition, inputs, benchmark.differentiable(inputs)).forward()
        truth = [y.double() if y.is_floating_point() else y for y in flat(ours)]
        assert relative_error(flat(theirs), truth) < 1e-5

    @pytest.mark.parametrize("op", OPS)
    def test_labels_differ(self, op):
        (benchmark,) = cli.load(BENCHMARKS, [op])
        keys = [(case.label, which) for case in benchmark.cases for which in case.passes]
        assert len(set(keys)) == len(keys)
        assert any(case.quick for case in benchmark.cases)

    def test_unknown_op_and_folder(self, tmp_path):
        with raises(ValueError, "op: got 'gruu'", "gru, gru_"):
            cli.load(BENCHMARKS, ["gruu"])
        with raises(ValueError, "bench_<op>.py", "checkout"):
            cli.load(tmp_path)

    @pytest.mark.slow
    def test_script(self, tmp_path, monkeypatch, capsys):
        command = [sys.executable, str(BENCHMARKS / "bench_gru_cell.py"), "--quick", "--threads=1"]
        command += ["--no-compile", "--seconds=0.1", "--force", "--results", str(tmp_path)]
        environment = {n: v for n, v in os.environ.items() if n != "OUT"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        (path,) = tmp_path.rglob("*.jsonl")
        assert path.stem.endswith("-local")
        found = results.read(path)
        assert {r["heap"] for r in found["rows"]} == {"warm"}
        assert {r["n_processes"] for r in found["rows"]} == {1}
        assert isa.disagreement(found["isa"]) is None
        assert path.parent.name == found["device"] == machine.device()
        (benchmark,) = cli.load(BENCHMARKS, ["gru_cell"])
        monkeypatch.setattr(sys, "argv", [*command[1:], "--heap=hot"])
        with pytest.raises(SystemExit) as ended:
            cli.run_script(benchmark, BENCHMARKS)
        assert ended.value.code == cli.EXIT_BAD_INPUT
        assert capsys.readouterr().err.startswith("error: heap: got 'hot'")
