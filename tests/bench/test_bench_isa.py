"""mbm_kernels.bench.isa: every library in one ISA, or no evidence."""

import json
from pathlib import Path

import pytest

from mbm_kernels._core import env, native
from mbm_kernels.bench import isa, machine, results
from tests.conftest import raises

ROOT = Path(__file__).resolve().parents[2]
AVX2 = {"mbm": "avx2"} | {name: {"isa": "avx2"} for name in isa.LIBRARIES}


@pytest.mark.parametrize(
    ("said", "ran", "found"),
    [
        ("Intel AVX2", "jit:avx2", "avx2"),
        ("Intel AVX-512 with Intel DL Boost", "brgconv:avx512_core", "avx512"),
        ("Intel AVX-512 with Intel DL Boost", "jit:avx2", "avx2"),  # what ran is what counts
        ("Intel AVX10.1/512 with AMX", "brg_conv_fwd:avx10_1_512", "avx512"),
        ("Intel SSE4.1", "jit:sse41", "baseline"),
        ("Intel AVX2", "gemm:ref", "avx2"),
        ("", "", None),
    ],
)
def test_onednn_is_read(said, ran, found):
    lines = [
        f"onednn_verbose,v1,info,cpu,isa:{said}",
        "onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32",
        f"onednn_verbose,v1,primitive,exec,cpu,convolution,{ran},forward_training,src:f32",
    ]
    assert isa.parse_onednn(lines if said else [])["isa"] == found


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("Intel(R) Advanced Vector Extensions 512 (Intel(R) AVX-512) enabled processors", "avx512"),
        ("Intel(R) Advanced Vector Extensions 2 (Intel(R) AVX2) enabled processors", "avx2"),
        ("Intel(R) Architecture processors", None),  # of AMD's it says no more
    ],
)
def test_mkl_is_read(said, found):
    line = f"MKL_VERBOSE oneMKL 2024.0 Update 2 Product build 20240605 for {said}, Lnx 2.45GHz lp64"
    assert isa.parse_mkl([line]) == {"isa": found, "says": said}


def test_a_rate_shows_that_a_library_runs_wider():
    peaks = {"baseline": 50.0, "avx2": 100.0, "avx512": 200.0}
    assert isa.of_rate(90, peaks, "avx2") == "avx2"
    assert isa.of_rate(40, peaks, "avx2") == "avx2"  # slow, not narrower
    assert isa.of_rate(150, peaks, "avx2") == "avx512"  # more than AVX2 can do, whatever was asked
    assert isa.of_rate(90, peaks, "baseline") == "avx2"
    assert isa.of_rate(500, peaks, "avx2") is None


def test_mkl_that_does_not_say(monkeypatch):
    for name in isa.MKL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native, "isa", lambda: "avx2")
    monkeypatch.setattr(isa, "_mkl_by_rate", lambda ours: {"isa": ours, "by": "rate"})
    assert isa._mkl_unsaid()["isa"] == native.cpu().best_isa()
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    assert isa._mkl_unsaid() == {"isa": "avx2", "by": "rate"}
    for name, value in (("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"), ("MKL_CBWR", "COMPATIBLE")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert isa._mkl_unsaid()["isa"] is None


def test_held_is_asked_of_every_library():
    for wanted in env.ISAS[:-1]:
        assert set(isa.environment(wanted)) <= set(isa.VARIABLES)
        assert len(isa.environment(wanted)) == len(isa.LIBRARIES)
    assert isa.environment(None) == isa.environment("avx512") == {}


def test_a_forced_isa_is_in_the_environment_of_a_run(monkeypatch):
    monkeypatch.setenv("MBM_ISA", "avx2")
    environment = machine.process_environment("default")
    assert environment["ATEN_CPU_CAPABILITY"] == "avx2"
    assert environment["ONEDNN_MAX_CPU_ISA"] == environment["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert not isa.is_held("avx2")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert isa.is_held("avx2")


@pytest.mark.parametrize("library", isa.LIBRARIES)
@pytest.mark.parametrize("other", ["avx512", "baseline", None])
def test_one_library_that_differs_is_named(library, other):
    found = {**AVX2, library: {"isa": other}}
    assert isa.disagreement(AVX2) is None
    assert isa.LIBRARIES[library] in isa.disagreement(found)
    with raises(ValueError, "isa: got mbm runs avx2", "expected one ISA"):
        isa.check(found)


def test_a_library_that_torch_lacks_does_not_differ():
    assert isa.disagreement({**AVX2, "mkl": {"isa": isa.ABSENT}}) is None


def test_avx512_made_of_avx2_is_no_isa():
    assert "avx512_lowered" in isa.disagreement({**AVX2, "mbm": "avx512_lowered"})


@pytest.mark.slow
def test_record_of_this_machine():
    found = isa.record()
    assert json.loads(json.dumps(found)) == found
    assert found["mbm"] == native.isa()
    assert found["aten"]["isa"] in env.ISAS
    for name in ("onednn", "mkl"):
        assert found[name]["isa"] in (*env.ISAS, isa.ABSENT)


FORMER = {"isa": "avx512", "torch_capability": "AVX512", "environment": {}}


class TestEvidence:
    def test_recorded_isas(self):
        new = {"machine": {"cpu": "x"}, "isa": AVX2}
        assert isa.refusal(new, "avx2") is None
        assert "measured in avx2, not avx512" in isa.refusal(new, "avx512")
        wider = {**new, "isa": {**AVX2, "aten": {"isa": "avx512"}}}
        assert "ATen avx512" in isa.refusal(wider, "avx2")

    def test_older_files(self):
        assert isa.refusal({"machine": FORMER}, "avx512") is None
        held = FORMER | {"isa": "avx2", "environment": {"MBM_ISA": "avx2"}}
        assert "not recorded" in isa.refusal({"machine": held}, "avx2")
        assert "oneDNN" in isa.refusal({"machine": FORMER | {"isa": "avx2"}}, "avx2")
        assert "on what machine" in isa.refusal({"rows": []}, "avx512")

    def test_local_files(self):
        local = {"machine": {"cpu": "x"}, "isa": AVX2, "local": True}
        assert "local edits" in isa.refusal(local, "avx2")

    @pytest.mark.parametrize(
        "path", sorted((ROOT / "benchmarks" / "results").glob("*/20*.json*")), ids=lambda p: p.name
    )
    def test_every_file_that_is_kept(self, path):
        """A folder is named after an ISA: what is in it ran in that, stock too."""
        found = results.read(path)
        ran = found["machine"]["isa"]
        assert path.parent.name == found["device"]
        assert found["device"].endswith(ran) or found["machine"]["gpu"]
        if not found["machine"]["gpu"]:
            assert isa.refusal(found, ran) is None
