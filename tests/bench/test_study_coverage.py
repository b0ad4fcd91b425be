"""Layers of real models beside engines."""

from benchmarks import study_coverage
from mbm_kernels._core import timing
from tests.bench.engines import Fake, fakes  # noqa: F401

SMALL = study_coverage.Layer(
    4, 8, 6, 6, (3, 3), (1, 1), (1, 1), 1, "relu", residual=True, max_pool=2, count=3
)


def test_a_layer_beside_engines(fakes, monkeypatch):
    monkeypatch.setattr(study_coverage, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(timing, "LEAST_SAMPLE_NS", 1000)
    fakes(Fake("engine"), Fake("absent", absent="not installed"))
    with timing.threads(1):
        row = study_coverage.measure(SMALL, 2, peers=True)
        alone = study_coverage.measure(SMALL, 2)
    assert row["engines"]["engine"]["error"] < 1e-6
    assert row["engines"]["engine"]["ns"] > 0
    assert row["no_engines"] == {"absent": "not installed"}
    assert row.keys() - alone.keys() == {"engines", "no_engines"}
    assert {f"auto {layout}" for layout in study_coverage.LAYOUTS} < alone.keys()


def test_a_model_against_engines():
    def row(count, auto, **engines):
        times = {"auto NCHW": auto, "auto channels_last": 2 * auto, "count": count}
        return times | {"engines": {name: {"ns": ns} for name, ns in engines.items()}}

    rows = [row(1, 10.0, onnxruntime=20.0, MNN=5.0), row(2, 5.0, onnxruntime=5.0)]
    found = study_coverage.against_engines(rows)
    assert found == {"onnxruntime": "1.50", "MNN": "0.50 (1 of 2)"}
