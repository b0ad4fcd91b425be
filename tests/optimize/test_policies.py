"""Which modules stay replaced, and what the report says of them."""

import gc
import weakref

import pytest
import torch
from torch import nn

import mbm_kernels
from mbm_kernels._core import timing
from mbm_kernels._core.ratios import Ratio
from mbm_kernels.nn import Conv2d
from mbm_kernels.optimize import measure
from mbm_kernels.optimize.fused import Fused
from tests.optimize.models import GRUClassifier, ResNet, warmed


@pytest.fixture
def words():
    return torch.randint(0, 11, (2, 5))


def changed(model):
    """Whether any module has another class than its author gave it."""
    ours = (Fused, Conv2d)
    return any(isinstance(module, ours) for module in model.modules())


def names(rows):
    return {row.name for row in rows}


class TestAuto:
    def test_keeps_torch_where_it_wins(self, predictions, words):
        predictions(lambda op, sizes: op.startswith("gru_b"))
        model = GRUClassifier()
        report = mbm_kernels.optimize(model, mode="training", sample_input=words)
        # nn.GRU asks for "gru" before it runs both directions.
        assert not report.replaced
        reason = {row.name: row.reason for row in report.kept}["cell"]
        assert reason == "predicted 0.50x of PyTorch, taken from 1.10x"
        assert type(model.cell) is nn.GRUCell

    def test_replaces_where_the_kernel_wins(self, predictions, words):
        predictions(lambda op, sizes: op != "gru_cell")
        model = GRUClassifier()
        report = mbm_kernels.optimize(model, mode="training", sample_input=words)
        (row,) = report.replaced
        assert (row.name, row.was, row.now) == ("gru", "torch.nn.GRU", "mbm_kernels.nn.GRU")
        assert row.backend == "cpu"
        assert row.reason == "predicted 2.00x"
        assert 0 < row.error < 1e-5
        assert row.ratio is None
        assert names(report.kept) == {"cell"}

    def test_chains(self, predictions):
        predictions(lambda op, sizes: sizes["R"] == 7)
        model, x = warmed(ResNet()), torch.randn(1, 3, 32, 32)
        report = mbm_kernels.optimize(model, sample_input=x)
        backends = {row.name: row.backend for row in report.replaced}
        assert backends.pop("conv1") == "cpu"
        assert set(backends.values()) == {"torch"}  # without BatchNorm's pass
        assert all(row.reason.startswith("BatchNorm folded") for row in report.replaced[1:])

    def test_chains_that_fold_nothing(self, torch_wins):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
        report = mbm_kernels.optimize(model, sample_input=torch.randn(1, 3, 8, 8))
        assert not report.replaced
        assert names(report.kept) == {"0", "2"}
        assert type(model) is nn.Sequential

    def test_what_the_sample_does_not_call(self, words):
        model = nn.ModuleDict({"used": GRUClassifier(), "not": nn.GRU(2, 2)})
        model.forward = lambda words: model["used"](words)
        report = mbm_kernels.optimize(model, mode="training", sample_input=(words,))
        reasons = {row.name: row.reason for row in report.kept}
        assert reasons["not"] == "not called with sample_input"

    def test_fused_attention_stays_torchs(self):
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
        report = mbm_kernels.optimize(model, sample_input=torch.randn(2, 3, 16))
        assert not report.replaced
        assert report.kept[0].reason == "not called with sample_input"

    def test_the_sample_leaves_no_trace(self):
        model = ResNet()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        random = torch.random.get_rng_state()
        named = {"x": torch.randn(2, 3, 16, 16, generator=torch.Generator())}
        mbm_kernels.optimize(model, mode="training", sample_input=named)
        assert torch.equal(torch.random.get_rng_state(), random)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        assert all(p.grad is None for p in model.parameters())

    def test_the_sample_is_not_kept(self):
        model, x = warmed(ResNet()), torch.randn(1, 3, 16, 16)
        alive = weakref.ref(x)
        report = mbm_kernels.optimize(model, sample_input=x)
        del x
        gc.collect()
        assert report is not None
        assert alive() is None

    def test_an_error_over_the_limit(self, predictions, words, monkeypatch):
        from mbm_kernels.ops.gru_cell.module import GRUCell

        predictions(lambda op, sizes: True)
        right = GRUCell.forward
        monkeypatch.setattr(GRUCell, "forward", lambda self, x, h=None: right(self, x, h) * 1.01)
        model = GRUClassifier()
        options = {"mode": "training", "sample_input": words}
        report = mbm_kernels.optimize(model, **options)
        assert names(report.kept) == {"cell"}
        assert "is over the limit" in report.kept[0].reason
        report.revert()
        with pytest.raises(ValueError, match="strict: got cell: its error"):
            mbm_kernels.optimize(model, strict=True, **options)
        assert type(model.gru) is nn.GRU


class TestAlways:
    def test_by_name(self, torch_wins, words):
        model = GRUClassifier()
        for sample in (None, words):
            report = mbm_kernels.optimize(
                model, mode="training", policy="always", sample_input=sample
            )
            assert [row.backend for row in report.replaced] == ["cpu", "cpu"]
            assert model.gru.backend == "cpu"
            report.revert()
        assert not hasattr(model.gru, "backend")

    def test_where_no_kernel_runs(self, words):
        model = GRUClassifier().double()
        report = mbm_kernels.optimize(model, mode="training", policy="always")
        assert not report.replaced
        assert "cpu: " in report.kept[0].reason
        assert "float64" in report.kept[0].reason
        with pytest.raises(ValueError, match="strict"):
            mbm_kernels.optimize(model, mode="training", policy="always", strict=True)

    def test_where_the_kernel_refuses_the_sample(self):
        model = nn.MultiheadAttention(8, 2, dropout=0.5)
        x = torch.randn(3, 2, 8)
        report = mbm_kernels.optimize(
            model, mode="training", policy="always", sample_input=(x, x, x)
        )
        assert "dropout on the weights is torch's only" in report.kept[0].reason


class TestMeasured:
    @pytest.fixture
    def measured(self, monkeypatch):
        """Says what is measured, by operation."""
        said = {"whole": (1.3, 1.2, 1.4)}
        monkeypatch.setattr(
            measure, "ratio", lambda candidate, backward: Ratio(*said[candidate.op])
        )
        monkeypatch.setattr(measure, "whole", lambda *args: Ratio(*said["whole"]))
        return said

    def test_keeps_what_wins_beyond_noise(self, measured, torch_wins, words):
        measured |= {"gru": (1.3, 1.2, 1.4), "gru_cell": (1.1, 1.0, 1.2)}
        model = GRUClassifier()
        report = mbm_kernels.optimize(model, mode="training", policy="measured", sample_input=words)
        (row,) = report.replaced
        assert (row.name, row.backend, row.ratio) == ("gru", "cpu", 1.3)
        assert row.reason == "measured 1.20 to 1.40"
        assert model.gru.backend == "cpu"  # auto would take torch
        (row,) = report.kept
        assert (row.name, row.ratio) == ("cell", 1.1)
        assert row.reason == "measured: not faster beyond noise"
        assert "the model measured 1.30x" in report.title

    def test_keeps_nothing_where_the_whole_is_not_faster(self, measured, torch_wins, words):
        measured |= {"gru": (1.3, 1.2, 1.4), "gru_cell": (1.1, 1.0, 1.2)}
        measured["whole"] = (1.01, 0.99, 1.03)
        model = GRUClassifier()
        report = mbm_kernels.optimize(model, mode="training", policy="measured", sample_input=words)
        assert not report.replaced
        assert type(model.gru) is nn.GRU
        assert report.ratio is None
        row = next(row for row in report.kept if row.name == "gru")
        assert (row.now, row.ratio) == ("torch.nn.GRU", 1.3)
        assert row.reason.startswith("the model with all that won alone measured 0.99 to 1.03")

    def test_leaves_the_choice_to_auto_where_it_agrees(self, measured, predictions, words):
        predictions(lambda op, sizes: True)
        measured |= {"gru": (1.3, 1.2, 1.4), "gru_cell": (1.3, 1.2, 1.4)}
        model = GRUClassifier()
        mbm_kernels.optimize(model, mode="training", policy="measured", sample_input=words)
        assert model.gru.backend == "auto"

    @pytest.mark.parametrize("mode", ["inference", "training"])
    def test_both_forms_run(self, mode, monkeypatch):
        monkeypatch.setattr(measure, "SECONDS", 0.0)
        monkeypatch.setattr(measure, "WHOLE_SECONDS", 0.0)
        monkeypatch.setattr(measure, "wins", lambda found: True)
        monkeypatch.setattr(timing, "calibrate", lambda call, sampler: (1, 1e6))
        model = warmed(ResNet())
        timed, sample = [], timing.sample
        monkeypatch.setattr(
            timing, "sample", lambda *given: (timed.append(changed(model)), sample(*given))[1]
        )
        report = mbm_kernels.optimize(
            model, mode=mode, policy="measured", sample_input=torch.randn(1, 3, 16, 16)
        )
        rows = [*report.replaced, *report.kept]
        assert all(row.ratio is not None for row in rows)
        assert len(names(rows)) == 6
        assert report.ratio is not None
        assert set(timed) == {True, False}  # the whole model's samples
        assert changed(model)
        report.revert()
        assert not changed(model)
        assert all(p.grad is None for p in model.parameters())
