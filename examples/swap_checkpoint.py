"""A checkpoint of a stock model, run by mbm_kernels: python examples/swap_checkpoint.py [FILE]

FILE is a state_dict of this model; without it one is made and saved, as another program would have.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import mbm_kernels


def make_model() -> nn.Module:
    block = [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(16 * 16 * 16, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *block, *head)


def main(file: Path) -> None:
    if not file.exists():
        torch.save(make_model().state_dict(), file)
    model = make_model().eval()
    model.load_state_dict(torch.load(file))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        report = mbm_kernels.optimize(model, sample_input=images)
        print(report)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == torch.load(file).keys()  # saved again, it fits both


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "model.pt")
