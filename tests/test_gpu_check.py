"""make gpu-check without a GPU: its processes, and rows measured on another device."""

import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.fx.experimental import _config

from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS, as_tuple
from mbm_kernels.bench import cli, gpu, gpu_check, gpu_processes, timing
from mbm_kernels.bench.benchmark import FORWARD, Form, prepare
from mbm_kernels.bench.gpu_child import Task
from mbm_kernels.bench.gpu_processes import Clock, Failure, measure, run_all
from mbm_kernels.bench.limits import Limits
from mbm_kernels.testing.suite import flat_tensors, placed, with_leaves

from .gpu import test_on_hardware as hardware

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = cli.load(ROOT / "benchmarks")
# Of its tasks it measures those called "good", in the way of gpu_child.
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
    return list(measure([task(n) for n in names], tmp_path, clock, (sys.executable, str(child))))


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
    monkeypatch.setattr(gpu_processes, "TASK_SECONDS", 1.0)
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
    assert done["hangs"].seconds < 2 + gpu_processes.GRACE_SECONDS
    assert all(f.code is None for f in run_all(commands, tmp_path, Clock(0), 2, {}))


def test_every_test_on_a_gpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda op, name: None if name == "triton" else "no")
    asked = [command for name in (*OPS, "captioner") for _, command in gpu_check.commands(name)]
    files = {Path(command[0]) for command in asked}
    assert Path("tests/gpu") in files
    assert Path("tests/gpu/test_decode_graph.py") in files
    for file in files:
        assert (ROOT / file).exists(), file
    for path in (ROOT / "tests" / "gpu").glob("test_*.py"):
        text = path.read_text()
        named = any(f"def test_{op}_" in text for op in OPS) or "PAIRS" in text
        assert named or path.relative_to(ROOT) in files, path


def test_tasks_are_the_quick_cases_of_each_benchmark():
    every = gpu_check.tasks(BENCHMARKS, whole=True)
    some = gpu_check.tasks(BENCHMARKS, whole=False)
    assert set(some) < set(every)
    assert {t.dtype for t in some} == {"bfloat16"}
    assert set(gpu_check.GOALS) <= {t.op for t in some}
    goals = [t.op in gpu_check.GOALS for t in some]
    assert goals == sorted(goals, reverse=True)
    for t in every:
        (benchmark,) = (b for b in BENCHMARKS if b.op == t.op)
        (case,) = (c for c in benchmark.gpu_cases if c.label == t.case)
        assert t.which in case.passes


def by_host(call, loops):
    return timing.sample(call, loops)


@pytest.fixture
def on_host(monkeypatch):
    """Rows are timed on the CPU, where nothing is captured."""

    def captured(call):
        raise RuntimeError("no graph on a CPU")

    monkeypatch.setattr(gpu, "captured", captured)
    monkeypatch.setattr(gpu, "lasting", lambda: None)
    monkeypatch.setattr(gpu, "hot_sample", by_host)
    monkeypatch.setattr(gpu, "cold_sample", by_host)
    monkeypatch.setattr(gpu, "_peak_extra_bytes", lambda call: 0)
    monkeypatch.setattr(gpu, "limits", lambda dtype: Limits(1e12, 1e11))
    monkeypatch.setattr(timing, "WARM_UP_NS", 0)
    monkeypatch.setattr(timing, "LEAST_SAMPLE_NS", 1)


def rows(benchmark, **changes):
    settings = gpu.GpuSettings(("bfloat16",), 0.0, 2, "torch", compile=False)
    case = next(c for c in benchmark.cases if c.quick)
    return list(gpu.run(benchmark, [case], replace(settings, **changes), torch.device("cpu")))


def benchmark_of(op):
    (benchmark,) = (b for b in BENCHMARKS if b.op == op)
    return benchmark


def test_rows_of_hot_and_cold(on_host):
    hot, cold = rows(benchmark_of("gru_cell"))[:2]
    assert (hot["l2"], cold["l2"]) == ("hot", "cold")
    assert hot["mbm_form"] == "mbm"
    assert "no graph on a CPU" in hot["unavailable"]["mbm, graph"]
    assert hot["ratio"] > 0
    assert gpu_check.line(hot)


def test_a_stock_form_that_fails_is_left_out(on_host):
    def broken(inputs):
        raise TypeError("not this one")

    benchmark = benchmark_of("gru_cell")
    form = Form(lambda inputs: (broken, {"inputs": inputs}))
    changed = replace(benchmark, stock=lambda case: {**benchmark.stock(case), "broken": form})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "check", lambda *args: {})
        row = rows(changed)[0]
    assert "TypeError: not this one" in row["unavailable"]["broken"]
    assert "broken" not in row["ratios"]


def test_any_error_is_a_row_of_its_own(on_host, monkeypatch):
    class CompilationError(Exception):
        pass

    def fails(*args):
        raise CompilationError("at line 3")

    monkeypatch.setattr(gpu, "check", fails)
    found = rows(benchmark_of("gru_cell"))
    assert [row["failed"] for row in found] == ["CompilationError: at line 3"] * len(found)
    assert gpu_check.line(found[0]).endswith("FAILED")
    monkeypatch.setattr(gpu, "lasting", lambda: "an illegal memory access")
    with pytest.raises(gpu.LastingError, match="illegal"):
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
            small = case.for_check(which)
            inputs = gpu.placer(torch.bfloat16, meta)(measured.inputs(small))
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
