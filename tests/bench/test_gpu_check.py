"""make gpu-check without a GPU: its processes, and rows measured on another device."""

import json
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.fx.experimental import _config

from mbm_kernels._core import dispatch, timing
from mbm_kernels._core.op import OPS, as_tuple
from mbm_kernels.bench import cli, machine, results
from mbm_kernels.bench.benchmark import BOTH, FORWARD, Form, prepare
from mbm_kernels.bench.gpu import check, goals, measure, processes, sanitizer
from mbm_kernels.bench.gpu.processes import Clock, Failure, run_all
from mbm_kernels.bench.gpu.worker import Task, tiny
from mbm_kernels.bench.limits import Limits
from mbm_kernels.testing.suite import flat_tensors, placed, with_leaves
from tests import children
from tests.gpu import test_on_hardware as hardware

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = cli.load(ROOT / "benchmarks")
# Of its tasks it measures those called "good", in the way of worker.py.
CHILD = """
    import json, os, sys, time
    for task in json.load(sys.stdin):
        print(json.dumps({"started": task}), flush=True)
        if task[0] == "crash":
            os._exit(9)
        if task[0] == "hang":
            time.sleep(60)
        print(json.dumps({"row": {"op": task[0], "process": os.getpid()}}), flush=True)
        print(json.dumps({"done": task}), flush=True)
        if task[0] == "lost":
            sys.exit(0)
"""


def task(name):
    return Task(name, "B1", FORWARD, "bfloat16", "triton")


def found(names, clock, tmp_path):
    child = tmp_path / "child.py"
    child.write_text(textwrap.dedent(CHILD))
    command = (sys.executable, str(child))
    return list(processes.measure([task(n) for n in names], tmp_path, clock, command))


def test_a_crash_costs_its_task_alone(tmp_path):
    rows = found(["good", "crash", "good", "lost", "good"], Clock(1), tmp_path)
    crash = rows.pop(1)
    assert isinstance(crash, Failure)
    assert crash.task.op == "crash"
    assert "status 9" in crash.reason
    assert [row["op"] for row in rows] == ["good", "good", "lost", "good"]
    first, second, third, fourth = (row["process"] for row in rows)
    assert len({first, second, fourth}) == 3, "each failure ends a process"
    assert second == third


def test_what_hangs_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "TASK_SECONDS", 1.0)
    rows = found(["hang", "good"], Clock(1), tmp_path)
    assert rows[0].reason == "no answer in 1 s"
    assert rows[1]["op"] == "good"


def test_the_time_ends_everything(tmp_path):
    begin = time.monotonic()
    rows = found(["good", "hang", "good"], Clock(2 / 60), tmp_path)
    assert time.monotonic() - begin < 10
    assert [getattr(row, "reason", None) for row in rows] == [
        None,
        "cut off by the time",
        "not reached in the time",
    ]


def test_commands_run_at_once_and_end_in_time(tmp_path):
    def python(code):
        return [sys.executable, "-c", code]

    commands = {
        "good": python("print('one passed')"),
        "bad": python("raise SystemExit(1)"),
        "hangs": python("import time; print('begun', flush=True); time.sleep(60)"),
        "never": python("print('too late')"),
    }
    commands = {name: commands[name] for name in ("hangs", "good", "bad", "never")}
    done = {f.name: f for f in run_all(commands, tmp_path, Clock(2 / 60), 2, {})}
    assert (done["good"].code, done["good"].output) == (0, "one passed\n")
    assert done["bad"].code == 1
    assert done["hangs"].code is None
    assert "begun" in done["hangs"].output
    assert done["hangs"].seconds < 3 + processes.GRACE_SECONDS
    assert all(f.code is None for f in run_all(commands, tmp_path, Clock(0), 2, {}))


def test_every_test_on_a_gpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda op, name: None if name == "triton" else "no")
    asked = [command for name in (*OPS, "captioner") for _, command in check.commands(name)]
    files = {Path(command[0]) for command in asked}
    assert Path("tests/gpu") in files
    assert Path("tests/gpu/test_decode_graph.py") in files
    for file in files:
        assert (ROOT / file).exists(), file
    for path in (ROOT / "tests" / "gpu").glob("test_*.py"):
        text = path.read_text()
        named = any(f"def test_{op}_" in text for op in OPS) or "PAIRS" in text
        assert named or path.relative_to(ROOT) in files, path


@pytest.fixture
def with_triton(monkeypatch):
    """As on a GPU: operations with a Triton kernel run it."""

    def why_not(op, name):
        return None if name == "triton" and name in dispatch._tables[op].backends else "no"

    monkeypatch.setattr(dispatch, "why_not", why_not)


def test_tasks_are_the_quick_cases_of_each_benchmark(with_triton):
    every = goals.tasks(BENCHMARKS, whole=True)
    some = goals.tasks(BENCHMARKS, whole=False)
    assert set(some) < set(every)
    assert {t.dtype for t in some} == {"bfloat16"}
    assert set(goals.GOALS) == {t.op for t in some}
    for t in every:
        (benchmark,) = (b for b in BENCHMARKS if b.op == t.op)
        (case,) = (c for c in benchmark.gpu_cases if c.label == t.case)
        assert t.which in case.passes


def test_each_operation_has_a_row_before_any_has_two(with_triton):
    some = goals.tasks(BENCHMARKS, whole=False)
    first = [t.op for t in some[: len(goals.GOALS)]]
    assert first == list(goals.GOALS)
    every = goals.tasks(BENCHMARKS, whole=True)
    assert [t for t in every if t in some] == some
    assert every[: len(some)] == some, "the goals before the rest"
    losses = [t for t in some if t.op in goals.TRAINED]
    assert losses[0].which == BOTH
    measured = goals.tasks(BENCHMARKS, whole=False, measured={"additive_attention"})
    assert measured[len(goals.GOALS) - 1].op == "additive_attention"


def test_what_was_measured_on_a_gpu_is_read_from_the_results(tmp_path):
    for device, backend in (("nvidia-h200", "triton"), ("amd-family26", "cpu")):
        file = results.ResultsFile(tmp_path, "abcdefg", device=device)
        file.append({"op": "gru", "backend": backend, "mbm_ms": 1.0})
        file.append({"op": "gru_cell", "backend": backend, "failed": "no"})
    assert goals.measured_before(tmp_path) == {"gru"}


def test_groups_hold_every_task_once_and_cases_whole(with_triton):
    some = goals.tasks(BENCHMARKS, whole=True)
    found = goals.groups(some, 5)
    assert sorted(t for group in found for t in group) == sorted(some)
    for case in {(t.op, t.case, t.dtype) for t in some}:
        assert sum(any((t.op, t.case, t.dtype) == case for t in group) for group in found) == 1


def test_smoke_is_one_tiny_call_of_each_operation(with_triton):
    found = goals.smoke_tasks(BENCHMARKS)
    ops = [op for op in OPS if "triton" in dispatch._tables[op].backends]
    assert sorted(t.op for t in found) == sorted(ops)
    for t in found:
        (benchmark,) = (b for b in BENCHMARKS if b.op == t.op)
        (case,) = (c for c in benchmark.gpu_cases if c.label == t.case)
        made = benchmark.inputs(tiny(case, t.which))
        assert sum(x.numel() for x in flat_tensors(made)) < 2**17, t


def test_a_backend_gets_the_cases_that_it_takes(monkeypatch):
    monkeypatch.setattr(goals, "gpu_backends", lambda op: ["triton", "cuda"])
    conv = [b for b in BENCHMARKS if b.op == "conv_bias_act"]
    by = {
        name: {t.case for t in goals.tasks(conv, whole=True) if t.backend == name}
        for name in ("triton", "cuda")
    }
    assert by["triton"] == {case.label for case in conv[0].gpu_cases}
    assert by["cuda"] == {
        case.label
        for case in conv[0].gpu_cases
        if case.sizes["C"] <= 4 or case.options.get("groups") == case.sizes["C"]
    }
    assert {t.backend for t in goals.smoke_tasks(conv)} == {"triton", "cuda"}


STAGED = """
    import json, os, sys
    for task in json.load(sys.stdin):
        print(json.dumps({"started": task}), flush=True)
        if task[0] == "gru":
            os._exit(9)
        row = {"op": task[0], "case": task[1], "pass": task[2], "dtype": task[3]}
        row |= {"backend": "triton", "error_of_budget": 0.25, "seconds": 1.5, "failed": ""}
        row |= {"failed": "an illegal access"} if task[0] == "gru_cell" else {}
        print(json.dumps({"row": row}), flush=True)
        print(json.dumps({"done": task}), flush=True)
"""


def test_stages_write_to_out_as_they_go(with_triton, tmp_path, monkeypatch):
    """smoke, then the forms called in several processes, then rows, by a child that pretends."""
    out, script = tmp_path / "out", tmp_path / "child.py"
    script.write_text(textwrap.dedent(STAGED))
    child = (sys.executable, str(script))
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(machine, "gpu", lambda: "nvidia-test")
    log = check.Log("all")
    chosen = [b for b in BENCHMARKS if b.op in ("gru", "gru_cell", "additive_attention")]
    failures = check.run_smoke(chosen, tmp_path, Clock(1), log, child)
    assert sorted(f.split(":")[1] for f in failures) == [" gru (triton)", " gru_cell (triton)"]
    rows = {row["op"]: row for row in json.loads((out / "smoke.json").read_text())}
    assert "status 9" in rows["gru"]["failed"]
    assert rows["additive_attention"]["error_of_budget"] == 0.25
    wanted = goals.tasks(chosen, whole=False)
    check.warm(wanted, tmp_path, Clock(1), log, child)
    failures = check.run_benchmarks(wanted, tmp_path, Clock(1), log, child)
    assert len(failures) == 4, "two passes of two operations"
    (path,) = out.glob("*-nocommit*.jsonl")
    assert {row["op"] for row in results.read(path)["rows"]} == {"gru_cell", "additive_attention"}
    said = (out / "gpu-check-all.log").read_text()
    assert "smoke: additive_attention (triton): 25% of the error's budget" in said
    assert "not warm: gru " in said
    assert "warm: 4 forms, 2 tasks not" in said
    assert len(list(out.iterdir())) == 3, "few files, all at the top"


@pytest.mark.parametrize(
    ("stage", "did"),
    [
        ("smoke", ["smoke"]),
        ("tests", ["build", "sanitizer", "tests"]),
        ("goals", ["warm", "rows"]),
        ("bench", ["warm", "rows"]),
        ("all", ["smoke", "build", "sanitizer", "tests", "warm", "rows"]),
    ],
)
def test_a_stage_does_its_own_work_alone(stage, did, monkeypatch, tmp_path):
    called = []

    def note(what, result):
        return lambda *given: called.append(what) or result

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, what in (("run_smoke", "smoke"), ("build", "build"), ("run_tests", "tests")):
        monkeypatch.setattr(check, name, note(what, []))
    monkeypatch.setattr(sanitizer, "run", note("sanitizer", []))
    monkeypatch.setattr(check, "warm", note("warm", None))
    monkeypatch.setattr(check, "run_benchmarks", note("rows", []))
    monkeypatch.setenv("OUT", "")
    assert check.main(["--stage", stage, "--out", str(tmp_path), "--minutes", "1"]) == 0
    assert called == did
    assert (tmp_path / f"gpu-check-{stage}.log").exists()


def test_what_is_warm_is_found_by_another_process(tmp_path):
    """A compiled stock form of a benchmark, called as `warm` does and then as a row is measured."""
    code = """
        import os
        from pathlib import Path

        import torch
        from mbm_kernels.bench import cli
        from mbm_kernels.bench.gpu import measure
        from torch._dynamo.utils import counters
        (benchmark,) = (b for b in cli.load(Path("benchmarks")) if b.op == "additive_attention")
        (case,) = (c for c in benchmark.cases if c.quick)
        settings = measure.GpuSettings(("float32",), backend="torch")
        device = torch.device("cpu")
        torch.set_num_threads(1)
        for _ in range(2):
            if os.fork():
                os.wait()
                continue
            found = dict(measure.warm(benchmark, case, "forward", settings, device))
            assert found["compile"] is None, found
            print("hits", counters["inductor"]["fxgraph_cache_hit"],
                  counters["aot_autograd"]["autograd_cache_hit"], flush=True)
            os._exit(0)
    """
    done = children.python("-c", code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    first, second = (x.split() for x in done.stdout.split("hits ")[1:])
    assert first == ["0", "0"], done.stderr
    assert "1" in second, "a graph compiled by the first process"


def by_host(call, loops):
    return timing.sample(call, loops)


@pytest.fixture
def on_host(monkeypatch):
    """Rows are timed on the CPU, where nothing is captured."""

    def captured(call):
        raise RuntimeError("no graph on a CPU")

    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(measure, "lasting", lambda: None)
    monkeypatch.setattr(measure, "hot_sample", by_host)
    monkeypatch.setattr(measure, "cold_sample", by_host)
    monkeypatch.setattr(measure, "_peak_extra_bytes", lambda call: 0)
    monkeypatch.setattr(measure, "limits", lambda dtype: Limits(1e12, 1e11))
    monkeypatch.setattr(timing, "WARM_UP_NS", 0)
    monkeypatch.setattr(timing, "LEAST_SAMPLE_NS", 1)


def rows(benchmark, **changes):
    settings = measure.GpuSettings(("bfloat16",), 0.0, 2, "torch", compile=False)
    case = next(c for c in benchmark.cases if c.quick)
    return list(measure.run(benchmark, [case], replace(settings, **changes), torch.device("cpu")))


def benchmark_of(op):
    (benchmark,) = (b for b in BENCHMARKS if b.op == op)
    return benchmark


def test_rows_of_hot_and_cold(on_host):
    hot, cold = rows(benchmark_of("gru_cell"))[:2]
    assert (hot["l2"], cold["l2"]) == ("hot", "cold")
    assert hot["mbm_form"] == "mbm"
    assert "no graph on a CPU" in hot["unavailable"]["mbm, graph"]
    assert hot["ratio"] > 0
    assert check.line(hot)


def test_a_stock_form_that_fails_is_left_out(on_host):
    def broken(inputs):
        raise TypeError("not this one")

    benchmark = benchmark_of("gru_cell")
    form = Form(lambda inputs: (broken, {"inputs": inputs}))
    changed = replace(benchmark, stock=lambda case: {**benchmark.stock(case), "broken": form})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "check", lambda *args: {})
        row = rows(changed)[0]
    assert "TypeError: not this one" in row["unavailable"]["broken"]
    assert "broken" not in row["ratios"]


def test_any_error_is_a_row_of_its_own(on_host, monkeypatch):
    class CompilationError(Exception):
        pass

    def fails(*args):
        raise CompilationError("at line 3")

    monkeypatch.setattr(measure, "check", fails)
    found = rows(benchmark_of("gru_cell"))
    assert [row["failed"] for row in found] == ["CompilationError: at line 3"] * len(found)
    assert check.line(found[0]).endswith("FAILED")
    monkeypatch.setattr(measure, "lasting", lambda: "an illegal memory access")
    with pytest.raises(measure.LastingError, match="illegal"):
        rows(benchmark_of("gru_cell"))


@pytest.mark.parametrize("measured", BENCHMARKS, ids=lambda b: b.op)
@_config.patch(meta_nonzero_assume_all_nonzero=True)
def test_gpu_cases_stay_on_their_device(measured):
    """Every eager form of every GPU case, on a device whose tensors mix with no other's."""
    meta = torch.device("meta")
    for case in measured.gpu_cases:
        if measured.op == "captioner" and case.passes == (FORWARD,):
            continue  # words, which are read on the host
        for which in case.passes:
            small = tiny(case, which)
            channels = {n: case.sizes[n] for n in ("C", "K") if n in case.sizes}  # of any groups
            small = replace(small, sizes=small.sizes | channels)
            inputs = measure.placer(torch.bfloat16, meta)(measured.inputs(small))
            diff = measured.differentiable(inputs)
            forms = {n: f for n, f in measured.stock(small).items() if which in f.passes}
            for name, form in {"mbm": measured.mbm("torch"), **forms}.items():
                if form.compile:
                    continue
                results = prepare(form, inputs, diff).call(which)()
                tensors = results if isinstance(results, tuple) else (results,)
                assert all(x.is_meta for x in tensors), (case.label, which, name)


@pytest.mark.parametrize("op", OPS)
def test_the_yardstick_stays_on_its_device(op):
    """Every case of the common tests by the torch backend; lengths stay on the CPU."""
    suite = hardware.suite_of(op)
    for case in (*suite.cases, *suite.edge_cases):
        given = placed(suite.inputs(case, torch.float32), torch.device("meta"))
        inputs, leaves = with_leaves(given, suite.diff)
        outputs = as_tuple(type(suite).function(**inputs, backend="torch"))
        grads = torch.autograd.grad(
            [o for o in outputs if o.requires_grad],
            list(leaves.values()),
            [torch.ones_like(o) for o in outputs if o.requires_grad],
            allow_unused=True,
        )
        found = flat_tensors({"outputs": outputs, "grads": grads})
        assert all(x.is_meta for x in found), case


@pytest.mark.parametrize("op", [op for op in OPS if "triton" in dispatch._tables[op].backends])
def test_triton_hardware_tests_run(op, monkeypatch):
    """What they share, with the interpreter in place of a GPU; lengths are where tensors are."""
    pytest.importorskip("triton")
    suite = hardware.suite_of(op)
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "DEVICE", torch.device("cpu"))
        patch.setattr(type(suite), "cases", suite.cases[:1])
        hardware.test_runs_agree_to_the_bit(op, "triton", torch.bfloat16, patch)
    monkeypatch.setattr(hardware, "DEVICE", torch.device("meta"))
    for case in suite.cases:
        inputs = hardware.on_device(suite, case, torch.float32)
        assert all(x.is_meta for x in flat_tensors(inputs))
        found = hardware.call_and_gradients(suite, inputs, "torch")
        assert all(x.is_meta for x in found)
