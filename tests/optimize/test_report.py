"""The report as text, JSON and HTML; parity; explain for models; the command line."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import mbm_kernels
from mbm_kernels import cli
from mbm_kernels._core import timing
from mbm_kernels.optimize import racing
from mbm_kernels.optimize.fused import PLAN
from mbm_kernels.optimize.report import Report, Row
from tests.bench.engines import Fake, fakes  # noqa: F401
from tests.conftest import raises
from tests.optimize.models import GRUClassifier, ResNet, warmed

ROWS = [
    Row("encoder.<0>", "Conv2d + BatchNorm2d + ReLU", "mbm_kernels.conv_bias_act", "cpu", "said"),
    Row("encoder.1", "torch.nn.GRU", "mbm_kernels.nn.GRU", "cpu", "measured", 1.5e-7, 1.25),
]
KEPT = [Row(f"layers.{i}", "torch.nn.GRU", "torch.nn.GRU", "torch", "slower") for i in range(3)]


@pytest.fixture
def report():
    return Report("inference", "auto", list(ROWS), list(KEPT), ["decoder: a [note] & more"])


class TestReport:
    @pytest.mark.parametrize("width", [40, 80, 120, 300])
    def test_text(self, report, width, monkeypatch):
        monkeypatch.setenv("COLUMNS", str(width))
        text = str(report)
        assert max(map(len, text.splitlines())) <= min(max(width, 80), 140)
        assert "2 replaced, 3 kept; mode inference, policy auto" in text
        for word in ("encoder.<0>", "Conv2d+BN+ReLU", "1.5e-07", "1.25", "a [note] & more"):
            assert word in text
        assert text.count("slower") == 1  # the three modules share a line

    def test_columns_without_content_are_left_out(self):
        text = str(Report("training", "auto", ROWS[:1]))
        assert "ratio" not in text
        assert "error" not in text

    def test_json(self, report):
        found = json.loads(report.to_json())
        assert found["replaced"][1]["error"] == 1.5e-7
        assert found["kept"][0]["reason"] == "slower"
        assert found["notes"] == report.notes

    def test_html(self, report, tmp_path):
        path = tmp_path / "report.html"
        report.to_html(path)
        text = path.read_text()
        assert "encoder.&lt;0&gt;" in text
        assert "a [note] &amp; more" in text
        assert text.count("<table>") == 2


class TestParity:
    def test_a_model_that_is_not_optimized_yet(self):
        model = warmed(ResNet())
        parity = mbm_kernels.check_parity(model, torch.randn(1, 3, 32, 32))
        assert parity.ok, str(parity)
        assert type(model) is ResNet
        assert 0 < parity.error < 1e-5
        assert json.loads(parity.to_json())["ok"]

    def test_gradients_of_inputs(self):
        x = torch.randn(2, 3, 8, requires_grad=True)
        model = nn.GRU(8, 4)
        with mbm_kernels.optimized(model, mode="training"):
            parity = mbm_kernels.check_parity(model, x)
        whats = {row.what for row in parity.rows}
        assert {"output[0]", "output[1]", "gradient of weight_ih_l0"} < whats
        assert "gradient of input[0][0]" in whats
        assert x.grad is None
        parity = mbm_kernels.check_parity(model, x, backward=False)
        assert {row.what for row in parity.rows} == {"output[0]", "output[1]"}

    def test_dropout_is_off(self):
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.5)
        assert mbm_kernels.check_parity(layer, torch.randn(3, 2, 16)).ok
        assert layer.dropout.p == layer.self_attn.dropout == 0.5

    def test_chains_run_from_the_first_call(self):
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
        mbm_kernels.optimize(model)
        (chain,) = vars(model)[PLAN].chains
        assert mbm_kernels.check_parity(model, x).ok
        chain.activation = "tanh"
        assert not mbm_kernels.check_parity(model, x).ok

    def test_what_is_wrong(self, monkeypatch, predictions):
        from mbm_kernels.ops.gru_cell.module import GRUCell

        predictions(lambda op, sizes: True)
        right = GRUCell.forward
        monkeypatch.setattr(GRUCell, "forward", lambda self, x, h=None: right(self, x, h) * 1.01)
        parity = mbm_kernels.check_parity(nn.GRUCell(4, 4), torch.randn(2, 4))
        assert not parity.ok
        assert "over" in str(parity)


class TestExplain:
    def test_a_model(self, predictions):
        predictions(lambda op, sizes: op == "gru_cell")
        model = GRUClassifier()
        random = torch.random.get_rng_state()
        found = mbm_kernels.explain(
            model, torch.randint(0, 11, (2, 5), generator=torch.Generator())
        )
        by_name = {}
        for row in found.rows:
            by_name.setdefault(row.name, []).append(row)
        assert by_name.keys() == {"gru", "cell"}
        assert by_name["cell"][0].backend == "cpu"
        assert by_name["gru"][0].backend == "torch"
        assert "predicted 0.50x of PyTorch" in by_name["gru"][0].why_not["cpu"]
        assert "cell: gru_cell" in str(found)
        assert type(model.gru) is nn.GRU
        assert torch.equal(torch.random.get_rng_state(), random)

    def test_a_fused_model(self, predictions):
        predictions(lambda op, sizes: True)
        model, x = warmed(ResNet()), torch.randn(1, 3, 16, 16)
        with torch.no_grad(), mbm_kernels.optimized(model):
            rows = mbm_kernels.explain(model, x).rows
        assert {row.name for row in rows} == {"ResNet", "layer1.0", "layer1.1"}
        assert all(row.backend == "cpu" for row in rows)

    def test_measured_times(self, predictions):
        predictions(lambda op, sizes: op == "gru_cell")
        model, words = GRUClassifier(), torch.randint(0, 11, (2, 5))
        with torch.no_grad():
            found = mbm_kernels.explain(model, words, measure=True)
        for row in found.rows:
            assert row.measured_ms.keys() == {"cpu", "torch"}
            assert all(0 < ms < 1e3 for ms in row.measured_ms.values())
        assert "measured" in str(found)
        assert type(model.gru) is nn.GRU
        assert "backend" not in vars(model.gru)
        (row,) = mbm_kernels.explain(
            "gru_cell", *(torch.randn(size) for size in CELL_SIZES), measure=True
        ).rows
        assert row.measured_ms.keys() >= {"cpu", "torch"}

    def test_a_module_that_must_stay(self):
        class Own(nn.GRUCell):
            pass

        (row,) = mbm_kernels.explain(nn.Sequential(Own(2, 2)), torch.randn(1, 2)).rows
        assert row.backend == "torch"
        assert "subclass of torch.nn.GRUCell" in row.why_not["cpu"]

    def test_what_is_neither(self):
        with raises(TypeError, "target: got int", "torch.nn.Module"):
            mbm_kernels.explain(3)


CELL_SIZES = ((2, 8), (2, 16), (48, 8), (48, 16), (48,), (48,))
MODEL_FILE = """
import torch
from torch import nn


def images():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def words():
    return nn.GRU(4, 4), torch.randn(3, 2, 4)


def nothing():
    return 3
"""


class TestCommandLine:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch, capsys):
        """Ends with an exit code; returns it with what was printed."""
        (tmp_path / "models.py").write_text(MODEL_FILE)
        monkeypatch.chdir(tmp_path)

        def run(*args):
            command = () if args[0] == "explain" else ("optimize",)
            monkeypatch.setattr(sys, "argv", ["mbm-kernels", *command, *args])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            return ended.value.code, *capsys.readouterr()

        yield run
        sys.modules.pop("models", None)

    def test_reports(self, run, tmp_path):
        code, out, _ = run(
            "models.py:images", "--batch", "2", "--size", "16", "--html", "report.html"
        )
        assert code == 0
        assert "mode inference, policy auto" in out
        assert (tmp_path / "report.html").is_file()
        code, out, _ = run("models.py:words", "--mode", "training", "--policy", "always", "--json")
        assert code == 0
        assert json.loads(out)["replaced"][0]["backend"] == "cpu"

    def test_engines_beside_the_whole_model(self, run, fakes, tmp_path, monkeypatch):
        monkeypatch.setattr(racing, "SECONDS", 0.01)
        monkeypatch.setattr(timing, "SETTLE_SECONDS", 1e-3)
        fakes(Fake("engine", scale=1 + 1e-3), Fake("absent", absent="not installed"))
        arguments = ("models.py:images", "--size", "16", "--engines")
        code, out, _ = run(*arguments, "--html", "report.html")
        assert code == 0
        assert "its time / ours" in out
        assert "no absent: not installed" in out
        assert "times our error" in (tmp_path / "report.html").read_text()
        code, out, _ = run(*arguments, "--json")
        beside = json.loads(out)["beside"]
        forms = {form["name"]: form for form in beside["forms"]}
        assert set(forms) == {"mbm_kernels", "PyTorch", "PyTorch channels_last", "engine"}
        assert forms["mbm_kernels"]["ratio"] == 1
        assert forms["engine"]["error"] == pytest.approx(1e-3, rel=0.01)
        assert forms["engine"]["version"] == "1.2"
        assert beside["missing"] == {"absent": "not installed"}
        code, _, err = run(*arguments, "--mode", "training")
        assert code == 2
        assert "expected inference" in err

    def test_explain(self, run):
        code, out, _ = run("explain", "models.py:words", "--measure", "--json")
        assert code == 0
        (row,) = json.loads(out)["rows"]
        assert row["measured_ms"].keys() == {"cpu", "torch"}
        code, out, _ = run("explain", "models.py:words")
        assert code == 0
        assert "measured" not in out.splitlines()[1]

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("torchvision:resnet18", "pip install torchvision"),
            ("timm:resnet18", "pip install timm"),
            ("resnet18", "expected torchvision:NAME"),
            ("other.py:make", "check the path"),
            ("models.py:make", "check the name"),
            ("models.py:nothing", "expected a torch.nn.Module"),
        ],
    )
    def test_errors_of_one_line(self, run, spec, words):
        package = spec.partition(":")[0]
        if package in ("torchvision", "timm") and find_spec(package):
            pytest.skip("it is installed")
        code, _, err = run(spec)
        assert code == 2
        assert words in err
        assert err.count("\n") == 1
