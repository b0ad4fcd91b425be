"""The compile-time gate: what it records, what it lets pass, and what it refuses."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import typer

from mbm_kernels._core import dispatch, triton_launch
from mbm_kernels.bench import exits
from mbm_kernels.bench.exits import CannotMeasure
from mbm_kernels.gate import cases, cli, compare, resources

ROOT = Path(__file__).resolve().parents[2]
ENTRY = dataclasses.asdict(
    resources.Resources(
        registers=64,
        stack=0,
        spill_stores=0,
        spill_loads=0,
        local_instructions=0,
        shared=1024,
        matrix_instructions=8,
        instructions=1000,
        occupancy=0.5,
    )
)


def moved(**changes):
    (move,) = compare.compare({"k": ENTRY}, {"k": {**ENTRY, **changes}}, whole=True)
    return move


def test_every_change_is_told():
    assert compare.compare({"k": ENTRY}, {"k": dict(ENTRY)}, whole=True) == []
    assert moved(registers=65).verdict == "WORSE"
    assert moved(registers=60).verdict == "BETTER"
    assert moved(occupancy=0.25).verdict == "WORSE"
    assert moved(matrix_instructions=16).verdict == "BETTER"
    assert moved(registers=60, instructions=1001).verdict == "WORSE"
    (new,) = compare.compare({}, {"k": ENTRY}, whole=True)
    (gone,) = compare.compare({"k": ENTRY}, {}, whole=True)
    assert (new.verdict, gone.verdict) == ("NEW", "GONE")
    assert compare.compare({"k": ENTRY}, {}, whole=False) == []


def test_a_reason_is_asked_for_spills_and_large_losses(tmp_path):
    path, versions = tmp_path / "op.json", {"triton": "1", "ptxas": "2"}
    compare.update(
        path,
        compare.read_baseline(path),
        {"k": ENTRY},
        compare.compare({}, {"k": ENTRY}, whole=True),
        versions,
        None,
    )
    stored = path.read_text()
    assert json.loads(stored) == {"versions": versions, "kernels": {"k": ENTRY}}
    for changes in ({"spill_stores": 4}, {"local_instructions": 1}, {"instructions": 1051}):
        now = {"k": {**ENTRY, **changes}}
        moves = compare.compare({"k": ENTRY}, now, whole=True)
        with pytest.raises(ValueError, match="expected a reason"):
            compare.update(path, compare.read_baseline(path), now, moves, versions, None)
        assert path.read_text() == stored
        compare.update(path, compare.read_baseline(path), now, moves, versions, "a wider tile")
        assert json.loads(path.read_text())["kernels"]["k"] == {
            **now["k"],
            "because": "a wider tile",
        }
        path.write_text(stored)
    now = {"k": {**ENTRY, "instructions": 1049}}
    compare.update(
        path,
        compare.read_baseline(path),
        now,
        compare.compare({"k": ENTRY}, now, whole=True),
        versions,
        None,
    )
    assert json.loads(path.read_text())["kernels"] == now


def test_a_new_kernel_that_spills_needs_a_reason():
    for name in ("spill_stores", "spill_loads", "local_instructions"):
        (move,) = compare.compare({}, {"k": {**ENTRY, name: 1}}, whole=False)
        assert move.needs_reason, name


def record(folder, versions, op="gru"):
    path = compare.baseline_path(folder, versions, op)
    compare.update(path, compare.read_baseline(path), {}, [], versions, None)
    return path


def test_a_baseline_is_of_one_triton_and_ptxas(tmp_path):
    mine, older = {"triton": "2", "ptxas": "7"}, {"triton": "1", "ptxas": "7"}
    record(tmp_path, older)
    with pytest.raises(CannotMeasure, match=r"got no baseline of triton 2 for gru.*those of 1\)"):
        compare.check_baselines(tmp_path, mine, ["gru"])
    assert record(tmp_path, mine) == tmp_path / "2" / "gru.json"
    compare.check_baselines(tmp_path, mine, ["gru"])
    compare.check_baselines(tmp_path, older, ["gru"])
    with pytest.raises(CannotMeasure, match="for gru_cell;"):
        compare.check_baselines(tmp_path, mine, ["gru", "gru_cell"])
    with pytest.raises(CannotMeasure, match="expected those of the baseline"):
        compare.check_baselines(tmp_path, mine | {"ptxas": "8"}, ["gru"])


def test_a_kernel_that_does_not_compile_is_a_regression_and_not_recorded(tmp_path):
    now = {"k": {compare.BROKEN: "CompilationError: at 3:4"}}
    moves = compare.compare({"k": ENTRY}, now, whole=True)
    assert compare.describe(moves[0]) == "BROKEN k: CompilationError: at 3:4"
    assert compare.compare({}, now, whole=True) == moves
    path = tmp_path / "op.json"
    with pytest.raises(RuntimeError, match="not to be recorded"):
        compare.update(path, compare.read_baseline(path), now, moves, {"triton": "1"}, None)
    assert not path.exists()


def same_compilation(launch, config, target):
    its = resources.specialise(launch, config, target)
    options = config.compile_options(target.nvidia)
    return repr((launch.kernel.name, its, sorted(options.items())))


@pytest.mark.parametrize("every_config", [False, True], ids=["default", "full"])
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.op} {case.name}")
def test_every_compilation_has_an_entry_of_its_own(case, every_config):
    target = resources.TARGETS["sm_90"]
    for dtype, torch_dtype in compare.DTYPES.items():
        launches = case.record(torch_dtype)
        found = compare.compilations(case.name, launches, dtype, target, every_config)
        keys = [each.key for each in found]
        assert len(set(keys)) == len(keys)
        wanted = {
            same_compilation(launch, config, target)
            for launch in launches
            for config in compare._configs(launch, dtype, every_config)
        }
        assert {same_compilation(e.launch, e.config, target) for e in found} == wanted


def test_what_varies_in_training_is_not_specialised():
    (case,) = (c for c in cases.CASES if c.name == "T1 S49")
    launches = {launch.kernel.name: launch for launch in case.record(torch.bfloat16)}
    target = resources.TARGETS["sm_90"]
    of = {
        name: resources.specialise(launch, launch.config, target).traits()
        for name, launch in launches.items()
    }
    assert of["attend"]["T"] == "i32", "neither 1 nor a multiple of 16 is told to the compiler"
    assert of["attend"]["D"] == "i32/16"
    assert of["grad_terms"]["B"] == of["grad_terms"]["D"] == "i32"


def test_what_differs_between_launches_is_in_the_key():
    (case,) = (c for c in cases.CASES if c.name == "V10000")
    launches = case.record(torch.bfloat16)
    keys = [
        c.key
        for c in compare.compilations(
            case.name, launches, "bfloat16", resources.TARGETS["sm_90"], every_config=False
        )
    ]
    for losses in ("None", "*fp32"):
        wanted = f"rows | V10000 | losses={losses} | bfloat16 | BLOCK_V=2048 warps=8 stages=1 | "
        assert f"{wanted}sm_90" in keys


def test_one_key_for_two_compilations_is_an_error(monkeypatch):
    (case,) = (c for c in cases.CASES if c.name == "V10000")
    monkeypatch.setattr(compare, "_describe", lambda config: "the same")
    with pytest.raises(RuntimeError, match="two compilations with one key: rows"):
        compare.compilations(
            case.name,
            case.record(torch.bfloat16),
            "bfloat16",
            resources.TARGETS["sm_90"],
            every_config=True,
        )


def raising(error):
    def gate():
        raise error

    return gate


@pytest.mark.parametrize(
    ("gate", "status"),
    [
        (lambda: exits.REGRESSION, 1),
        (raising(ValueError("bad")), 2),
        (raising(CannotMeasure("no baseline")), 3),
        (raising(RuntimeError("broke")), 70),
        (raising(AssertionError()), 70),
    ],
)
def test_only_a_regression_ends_as_one(gate, status, capsys):
    assert exits.status(gate) == status
    assert ("Traceback" in capsys.readouterr().err) == (status == exits.INTERNAL)


def test_the_command_says_that_there_is_no_baseline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(triton_launch, "interpreting", lambda: False)
    monkeypatch.setattr(compare, "measure", raising(AssertionError("compiles for nothing")))
    with pytest.raises(typer.Exit) as ended:
        cli.static_gate(op=["gru"], folder=tmp_path)
    assert ended.value.exit_code == exits.CANNOT_MEASURE
    assert "got no baseline of triton" in capsys.readouterr().err


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.op} {case.name}")
def test_cases_record_without_running(case):
    launches = case.record(torch.bfloat16)
    assert launches
    assert not triton_launch.recording()
    for launch in launches:
        assert all(n > 0 for n in launch.grid)


RECORDED = sorted(path.name for path in (ROOT / "benchmarks" / "static").glob("[0-9]*"))


def test_the_pinned_triton_has_a_baseline():
    pinned = re.search(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in RECORDED


@pytest.mark.parametrize("version", RECORDED)
def test_every_triton_backend_is_gated_and_does_not_spill(version):
    """By the recorded baseline: no configuration spills on sm_90 without its reason."""
    for op in dispatch._tables:
        if "triton" not in dispatch._tables[op].backends:
            continue
        path = ROOT / "benchmarks" / "static" / version / f"{op}.json"
        recorded = json.loads(path.read_text())["kernels"]
        names = {key.partition(" | ")[0] for key in recorded}
        assert names == set(triton_launch.read_configs(op)), op
        for key, entry in recorded.items():
            if key.endswith("sm_90"):
                spills = [entry[n] for n in ("stack", "spill_stores", "spill_loads")]
                assert not any(spills) or entry.get("because"), f"{op}: {key}"


@pytest.mark.parametrize("version", RECORDED)
def test_what_a_baseline_holds_is_what_is_compiled(version):
    """At least all of the default run: a case that changed is recorded with every triton."""
    for op in {case.op for case in cases.CASES}:
        path = ROOT / "benchmarks" / "static" / version / f"{op}.json"
        recorded = set(json.loads(path.read_text())["kernels"])
        for dtype in compare.DEFAULT_DTYPES:
            for target in compare.DEFAULT_TARGETS:
                for case in cases.of(op):
                    launches = case.record(compare.DTYPES[dtype])
                    of = resources.TARGETS[target]
                    found = compare.compilations(case.name, launches, dtype, of, every_config=False)
                    assert {each.key for each in found} <= recorded


@pytest.mark.slow
def test_two_runs_agree(tmp_path):
    """Through the command, in a process without the interpreter that the tests run under.

    Both find what `make gate` or an earlier run compiled; that compilers repeat themselves is what
    the gate itself shows, by a baseline of another machine.
    """
    code = """
        import json
        import sys
        from pathlib import Path

        from mbm_kernels.cli import main

        folder = Path(sys.argv[1])

        def run(*options):
            sys.argv = ["mbm-kernels", "gate", "static", "--op", "concat_linear"]
            sys.argv += ["--folder", str(folder), *options]
            try:
                main()
            except SystemExit as end:
                return end.code

        codes = [run("--update")]
        (path,) = folder.glob("*/concat_linear.json")
        text = path.read_text()
        kernels = json.loads(text)["kernels"]
        first = next(iter(kernels.values()))
        was = f'"registers": {first["registers"]}'
        path.write_text(text.replace(was, '"registers": 1', 1))
        codes.append(run())
        print(json.dumps([codes, kernels]))
    """
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        cwd=ROOT,
        env={**variables, "TRITON_CACHE_DIR": str(tmp_path / "triton")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    codes, kernels = json.loads(done.stdout.splitlines()[-1])
    assert codes == [exits.OK, exits.REGRESSION], done.stderr
    kernel = next(iter(kernels.values()))
    assert kernel["registers"] > 0
    assert kernel["instructions"] > 0
    assert f"{len(kernels)} compilations, 1 moved" in done.stdout, "all others agree"
    assert "WORSE" in done.stdout
