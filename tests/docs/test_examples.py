"""The examples run, with the smallest settings that their files document."""

import runpy
import sys

import pytest
import torch
from torch import nn

import mbm_kernels
from tests.docs.pages import DOCS

EXAMPLES = DOCS.parent / "examples"
ARGUMENTS = {
    "swap_checkpoint": [],
    "lightning_callback": [],
    "timm_training": ["1"],
    "streaming_gru": ["1"],
    "captions": ["2"],
}
NEEDS = {"timm_training": "timm"}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example_runs(name, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"this example needs {NEEDS[name]}")
    path = EXAMPLES / f"{name}.py"
    assert 20 <= len(path.read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS[name]])
    runpy.run_path(str(path), run_name="__main__")


def test_callback_with_a_trainer_of_our_own():
    """The hooks in the order in which Lightning's Trainer calls them."""
    callback = runpy.run_path(str(EXAMPLES / "lightning_callback.py"))["MbmKernels"]()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stock, before = model[0], model[0].weight.detach().clone()
    for number in range(2):
        batch = [torch.randn(4, 3, 8, 8), torch.randint(2, (4,))]
        callback.on_train_batch_start(None, model, batch, number)
        assert len(callback.report.replaced) + len(callback.report.kept) == 1
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    callback.on_fit_end(None, model)
    assert type(model[0]) is nn.Conv2d
    assert model[0] is stock
    assert not torch.equal(stock.weight, before)


def test_callback_with_lightning():
    """Runs where Lightning is installed, which this project's environment does not hold."""
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 8, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

        def training_step(self, batch, _):
            return self(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = runpy.run_path(str(EXAMPLES / "lightning_callback.py"))["MbmKernels"](
        policy="always"
    )
    data = torch.utils.data.TensorDataset(torch.randn(8, 5, 4))
    model = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
    with dispatch_seen() as seen:
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    assert "cpu" in seen
    assert type(model.rnn) is nn.GRU


def dispatch_seen():
    return mbm_kernels._core.dispatch.watched()
