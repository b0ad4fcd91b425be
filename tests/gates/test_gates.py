"""The logic of make sanitize, make gate and make mutants, without their compilers and valgrind."""

import ctypes
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

import mbm_kernels
from mbm_kernels._core import native
from mbm_kernels._core.op import OPS
from mbm_kernels.bench import exits
from mbm_kernels.bench.exits import CannotMeasure
from mbm_kernels.testing import cases, strata
from tests.gates import (
    base_revision,
    coverage,
    instruction_cases,
    instructions,
    mutants,
    record,
    replay,
    sanitize,
)
from tests.gates.planting import ROOT, Mutant, planted

REPLAY = ROOT / "tests" / "gates" / "replay.py"


class TestReplay:
    @pytest.mark.parametrize("placement", ["end", "start"])
    def test_a_write_beside_a_buffer_is_seen(self, placement):
        buffer = replay.Guarded(b"1234567", placement)
        assert ctypes.string_at(buffer.address, 7) == b"1234567"
        buffer.check()
        beside = buffer.address - 1 if placement == "end" else buffer.address + 7
        ctypes.memset(beside, 1, 1)
        with pytest.raises(AssertionError, match="outside of a buffer"):
            buffer.check()

    @pytest.mark.parametrize(("placement", "beside"), [("end", 4), ("start", -1)])
    def test_the_pages_around_may_not_be_read(self, placement, beside):
        code = (
            "import ctypes, replay\n"
            f"buffer = replay.Guarded(b'1234', {placement!r})\n"
            f"ctypes.string_at(buffer.address + {beside}, 1)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=REPLAY.parent)
        assert done.returncode == -signal.SIGSEGV

    def test_a_null_length_buffer_has_its_pages(self):
        replay.Guarded(b"", "end").check()

    def test_recorded_calls_are_made_again_without_torch(self, tmp_path):
        path = tmp_path / "records"
        with record.recording(path, threads=3) as recorder:
            record.record_common(recorder)
            record.record_drawn(recorder, "additive_attention", False, 3)
        assert torch.get_num_threads.__name__ != "<lambda>"
        found = list(replay.read(path))
        forward = [r for r in found if r.function == "additive_attention_fwd"]
        assert len(forward) == 6
        kept = [r for r in forward if r.label.endswith(", keys")]
        assert len(kept) == 3
        assert sum(r.function == "additive_attention_pack_key" for r in found) == len(kept)
        assert all(r.arguments[-1] == 3 and len(r.buffers) >= 6 for r in forward)
        extension = sanitize.extension(ROOT)
        command = [sys.executable, "-S", str(REPLAY), str(extension), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.strip() == f"{len(found)} calls", done.stderr[-2000:]
        assert "torch" not in subprocess.check_output(
            [sys.executable, "-S", "-c", "import sys, replay; print(*sys.modules)"],
            cwd=REPLAY.parent,
            text=True,
        )

    def test_results_are_compared(self, tmp_path):
        module = native.cpu()
        given = replay.Record("sizes", module.isa(), "gru_packed_sizes", (3, 5), [], (0, 0, 0))
        with pytest.raises(AssertionError, match="returned"):
            replay.replay(given, module, "end")

    def test_an_address_of_no_tensor_is_refused(self, tmp_path):
        with (
            record.recording(tmp_path / "records") as recorder,
            pytest.raises(ValueError, match="no"),
        ):
            recorder.vector_math(native.cpu().VectorFunction.exp, 2**40, 2**40, 4)


class TestInstructions:
    def test_every_operation_is_counted(self):
        assert {op for op, _, _ in instruction_cases.cases()} == set(OPS)

    def test_moves(self):
        before = {"same": 1000, "little": 1000, "worse": 1000, "better": 1000, "gone": 5}
        after = {"same": 1000, "little": 1019, "worse": 1061, "better": 970, "new": 7}
        moves = instructions.compare(before, after, instructions.HELD)
        assert [m.name for m in moves] == ["better", "gone", "new", "worse"]
        assert "+6.1%" in str(moves[-1])
        assert [m.name for m in instructions.compare(before, after, 0.0)] == [
            *("better", "gone", "little", "new", "worse")
        ]

    def test_worse_needs_a_file_that_names_the_count(self, tmp_path):
        moves = instructions.compare({"gru, one row: f": 1000}, {"gru, one row: f": 1061}, 0.0)
        assert instructions.unexplained(tmp_path, moves) == moves
        path = instructions.why(tmp_path, moves[0].name)
        path.parent.mkdir()
        path.write_text("1,060 instructions, for another count")
        assert instructions.unexplained(tmp_path, moves) == moves
        path.write_text("1,061 instructions, but 5 % less time: ...")
        assert not instructions.unexplained(tmp_path, moves)

    def test_profiles_are_added_up_by_name(self, tmp_path):
        for i, (name, total) in enumerate([("a", 5), ("b", 7), ("a", 6)]):
            text = f"desc: Trigger: Client Request: {name}\nfn=x\n1 2\ntotals: {total}\n"
            (tmp_path / f"profile.{i}").write_text(text)
        (tmp_path / "profile.9").write_text("desc: Trigger: Program termination\ntotals: 9\n")
        assert instructions.read_counts(tmp_path) == {"a": 11, "b": 7}


def commit(root, text):
    (root / "csrc").mkdir(exist_ok=True)
    (root / "csrc" / "a.cpp").write_text(text)
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["add", "-A"], [*identity, "commit", "-qm", text]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return base_revision.git(root, "rev-parse", "HEAD")


class TestBaseRevision:
    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "repository"
        root.mkdir()
        subprocess.run(["git", "init", "-q", "-b", "main"], cwd=root, check=True)
        return root

    def test_which_it_is(self, root):
        with pytest.raises(CannotMeasure, match="no revision to compare with"):
            base_revision.revision(root, None)
        first = commit(root, "one")
        with pytest.raises(CannotMeasure, match="--base"):
            base_revision.revision(root, None)
        second = commit(root, "two")
        assert base_revision.revision(root, None) == first
        assert base_revision.revision(root, second[:9]) == second
        with pytest.raises(ValueError, match="--base: got 'nowhere'"):
            base_revision.revision(root, "nowhere")
        subprocess.run(["git", "checkout", "-q", "-b", "mine"], cwd=root, check=True)
        commit(root, "three")
        commit(root, "four")
        assert base_revision.revision(root, None) == second, "where it left the main branch"
        head = commit(root, "five")
        (root / "csrc" / "a.cpp").write_text("not committed")
        assert base_revision.revision(root, None) == head

    def test_outside_of_git_nothing_is_measured(self, tmp_path):
        with pytest.raises(CannotMeasure):
            base_revision.revision(tmp_path, None)

    def test_moves_that_a_baseline_records(self, root):
        folder = root / "instructions"
        folder.mkdir()
        (folder / "g++-1.json").write_text('{"a": 1, "b": 2}')
        before = commit(root, "one")
        (folder / "g++-1.json").write_text('{"a": 1, "b": 3, "c": 4}')
        assert base_revision.recorded_moves(root, before, folder) == {"b"}

    def test_a_revision_that_does_not_compile_says_so(self, root):
        (root / "setup.py").write_text("raise SystemExit('no compiler')")
        only = commit(root, "one")
        with pytest.raises(CannotMeasure, match="does not compile"):
            base_revision.count(root, only)


class TestInstructionGate:
    """Which baseline it takes, and how it ends."""

    @pytest.fixture
    def counts(self, monkeypatch, tmp_path):
        """What the base and this tree count, of a compiler without a baseline."""
        found = {"base": {"a": 1000, "b": 1000}, "here": {"a": 1000, "b": 1000}}
        monkeypatch.setattr(instructions, "compiler_key", lambda: "g++-99.1")
        monkeypatch.setattr(instructions, "FOLDER", tmp_path)
        monkeypatch.setattr(instructions, "count", lambda: found["here"])
        monkeypatch.setattr(base_revision, "revision", lambda root, asked: "f" * 40)
        monkeypatch.setattr(base_revision, "count", lambda root, commit: found["base"])
        monkeypatch.setattr(base_revision, "recorded_moves", lambda *given: set())
        return found

    def ends(self, monkeypatch, *options):
        monkeypatch.setattr(sys, "argv", ["gate", *options])
        with pytest.raises(SystemExit) as ended:
            instructions.main()
        return ended.value.code

    def test_without_a_baseline_the_base_revision_is_counted(self, counts, monkeypatch, capsys):
        assert self.ends(monkeypatch) == exits.OK
        said = capsys.readouterr().out
        assert "no baseline for g++-99.1, only for no compiler" in said
        assert f"comparing with {'f' * 12}" in said
        counts["here"] = {"a": 900, "b": 1015, "new": 5}
        assert self.ends(monkeypatch) == exits.OK
        counts["here"] = {"a": 1000, "b": 1021}
        assert self.ends(monkeypatch) == exits.REGRESSION
        monkeypatch.setattr(base_revision, "recorded_moves", lambda *given: {"b"})
        assert self.ends(monkeypatch) == exits.OK

    def test_a_baseline_needs_no_base(self, counts, monkeypatch, tmp_path):
        (tmp_path / "g++-99.1.json").write_text('{"a": 1000, "b": 1000}')
        monkeypatch.setattr(base_revision, "count", None)
        assert self.ends(monkeypatch) == exits.OK
        counts["here"] = {"a": 970, "b": 1000}
        assert self.ends(monkeypatch) == exits.REGRESSION, "a gain is recorded too"
        assert self.ends(monkeypatch, "--update") == exits.OK
        assert self.ends(monkeypatch) == exits.OK

    def test_statuses_of_what_cannot_be_measured(self, counts, monkeypatch, capsys):
        counts["base"] = {"other": 5}
        assert self.ends(monkeypatch) == exits.CANNOT_MEASURE
        assert "has none of these cases" in capsys.readouterr().err

        def fails():
            raise RuntimeError("valgrind failed")

        monkeypatch.setattr(instructions, "count", fails)
        assert self.ends(monkeypatch) == exits.INTERNAL
        assert self.ends(monkeypatch, "--bass") == exits.BAD_INPUT
        monkeypatch.setattr(instructions, "count", lambda: {"a": instructions.MOST + 1})
        assert self.ends(monkeypatch) == exits.BAD_INPUT


class TestPlanting:
    @pytest.mark.parametrize(
        "mutant",
        [*mutants.MUTANTS, *(m for given in sanitize.PLANTED.values() for m in given)],
        ids=lambda mutant: mutant.name,
    )
    def test_its_text_occurs_once(self, mutant):
        assert (ROOT / mutant.path).read_text().count(mutant.old) == 1, mutant.path

    def test_the_text_is_put_back(self, tmp_path, capsys):
        path = tmp_path / "a.cpp"
        path.write_text("one two")
        with planted(Mutant("", "a.cpp", "two", "three", ""), tmp_path):
            assert path.read_text() == "one three"
        assert path.read_text() == "one two"
        with pytest.raises(SystemExit), planted(Mutant("", "a.cpp", "six", "", ""), tmp_path):
            pass
        assert "occurs 0 times" in capsys.readouterr().out

    def test_each_has_tests_of_its_operation(self):
        for mutant in mutants.MUTANTS:
            for name in mutants.more_tests(mutant).split():
                assert (ROOT / name).exists()

    def test_a_report_names_the_call(self):
        done = subprocess.CompletedProcess(
            [], 77, "", "f [avx2] first\nf [avx2] second\n==1==ERROR: AddressSanitizer\n"
        )
        assert sanitize.report(done).startswith("in the call f [avx2] second\n==1==ERROR")


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(cases.drawn("gru_cell", False))
def test_other_values_keep_their_shapes(drawn):
    again = drawn.redraw(2**20)
    assert repr(again) == repr(drawn)
    assert not torch.equal(again.inputs["x"], drawn.inputs["x"])


class TestCoverage:
    def test_a_line_runs_where_any_of_its_objects_runs_it(self):
        counts = {}
        for first, second in ((0, 3), (2, 0)):
            lines = [{"line_number": 1, "count": first}, {"line_number": 2, "count": second}]
            files = [{"file": "csrc/a.h", "lines": lines}, {"file": "/usr/b.h", "lines": lines}]
            coverage.merge(counts, files)
        assert counts == {"csrc/a.h": {1: 2, 2: 3}}

    def test_what_is_not_run_is_told_unless_it_is_named(self, tmp_path):
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc" / "a.h").write_text("one\n  two\nthree\n")
        counts = {"csrc/a.h": {1: 5, 2: 0, 3: 0}}
        share, missed = coverage.report(counts, tmp_path)
        assert share == pytest.approx(1 / 3)
        assert missed == ["csrc/a.h:2: two", "csrc/a.h:3: three"]
        kernels = {"csrc/a.h": {"tile<1>": 0, "tile<2>": 0, "tile<3>": 2}}
        named = {"csrc/a.h": {"two": "asserts", "tile<2>": "of no size"}}
        left = coverage.reasons(counts, kernels, named, tmp_path)
        assert left == ({"csrc/a.h": {1: 5, 3: 0}}, {"csrc/a.h": {"tile<1>": 0, "tile<3>": 2}})
        assert coverage.report_instances(left[1]) == (0.5, ["csrc/a.h: tile<1>"])
        for stale in ("one", "tile<3>", "gone"):
            with pytest.raises(ValueError, match=f"got {stale!r}, which runs or is gone"):
                coverage.reasons(counts, kernels, {"csrc/a.h": {stale: "?"}}, tmp_path)

    def test_instances_are_told_apart_by_their_numbers(self):
        functions = [
            {"demangled_name": f"void mbm::avx2::{name}", "execution_count": count}
            for name, count in (
                ("(anonymous namespace)::tile<1, false>(long, Tile const&)", 0),
                ("(anonymous namespace)::tile<1, false>(long, Tile const&)", 4),
                ("tile<2, true>(Tile const&)", 0),
                ("gemm<StoreAsIs>(int)", 0),
                ("tile<2, true>(Tile const&)::{lambda(int)#1}::operator()(int) const", 0),
            )
        ]
        instances = {}
        coverage.merge_instances(instances, [{"file": "csrc/a.h", "functions": functions}])
        assert instances == {"csrc/a.h": {"tile<1, false>": 4, "tile<2, true>": 0}}

    def test_objects_of_sources_that_are_gone_are_not_counted(self, tmp_path):
        (tmp_path / "build.ninja").write_text("build temp/here_cpu.cpp.avx2.o: cc here_cpu.cpp\n")
        for name in ("here_cpu.cpp.avx2.gcno", "here_cpu.cpp.avx2.gcda", "gone_cpu.cpp.avx2.gcno"):
            (tmp_path / name).touch()
        coverage.clear(tmp_path)
        assert [path.name for path in tmp_path.glob("*.gc*")] == ["here_cpu.cpp.avx2.gcno"]

    def test_incoming_gradients_take_every_layout(self):
        y, generator = torch.empty(3, 4), torch.Generator().manual_seed(0)
        strides = {record._gradient(y, name, generator).stride() for name in record.GRADIENTS}
        assert strides == {(4, 1), (1, 3), (8, 2), (0, 1), (0, 0)}


@pytest.mark.parametrize("op", sorted(strata.STRATA))
def test_strata_are_calls_of_the_cpu_kernels(op):
    found = strata.of(op)
    assert len({what for what, _ in found}) == len(found)
    for _, inputs in found:
        getattr(mbm_kernels.ops, op)(**inputs, backend="cpu")


@pytest.mark.parametrize("op", record.kernels())
def test_cases_of_its_tests_are_recorded(op):
    cases_of = [case for suite in record.suites(op) for case in suite.edge_cases]
    assert cases_of, "sizes of 0 come from there"
