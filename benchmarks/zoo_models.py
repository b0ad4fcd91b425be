"""Models that nobody here wrote, and such as people describe: what `zoo.py` optimizes.

torchvision's and timm's come from their packages, with random weights. Those of speech, time series
and tables are written here from their papers or repositories with torch's own modules, so that
nothing of this package is in them.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_kernels.optimize.packages import torchvision

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Entry:
    """A model and what it is called with. images: whether a channels_last input is the same."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    package: str | None = None
    images: bool = True

    def missing(self) -> str | None:
        """The package that is not installed, if any."""
        if self.package is None or importlib.util.find_spec(self.package):
            return None
        return self.package


def _lively(model: nn.Module) -> nn.Module:
    """Statistics of BatchNorm as after training, not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def _images(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)


def _of_torchvision(name: str) -> Entry:
    def make() -> nn.Module:
        return _lively(torchvision().models.get_model(name, weights=None))

    return Entry(f"torchvision:{name}", make, _images, "torchvision")


def _of_timm(name: str) -> Entry:
    def make() -> nn.Module:
        torchvision()
        return _lively(importlib.import_module("timm").create_model(name, pretrained=False))

    return Entry(f"timm:{name}", make, _images, "timm")


class DeepSpeech2(nn.Module):
    """Two long convolutions over a spectrogram, then bidirectional GRUs (Amodei et al., 2016)."""

    def __init__(self, hidden: int = 512, layers: int = 3, letters: int = 29) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv2d(1, 32, (41, 11), stride=(2, 2), padding=(20, 5), bias=False),
            nn.BatchNorm2d(32),
            nn.Hardtanh(0, 20),
            nn.Conv2d(32, 32, (21, 11), stride=(2, 1), padding=(10, 5), bias=False),
            nn.BatchNorm2d(32),
            nn.Hardtanh(0, 20),
        )
        self.rnn = nn.GRU(32 * 41, hidden, layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, letters)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """spectrogram: [B, 1, 161, T]; logits [B, T / 2, letters]."""
        maps = self.front(spectrogram)
        return self.head(self.rnn(maps.flatten(1, 2).transpose(1, 2))[0])


class Highway(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.change, self.gate = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return gate * torch.relu(self.change(x)) + (1 - gate) * x


class Cbhg(nn.Module):
    """Convolution bank, highways, bidirectional GRU (Tacotron, Wang et al., 2017)."""

    def __init__(self, size: int = 128, widest: int = 8) -> None:
        super().__init__()

        def convolution(inputs: int, width: int, active: bool = True) -> nn.Sequential:
            layers = [nn.Conv1d(inputs, size, width, padding=width // 2), nn.BatchNorm1d(size)]
            return nn.Sequential(*layers, *([nn.ReLU()] if active else []))

        self.bank = nn.ModuleList(convolution(size, width) for width in range(1, widest + 1))
        self.pool = nn.MaxPool1d(2, 1, 1)
        self.project = nn.Sequential(
            convolution(size * widest, 3), convolution(size, 3, active=False)
        )
        self.highways = nn.Sequential(*(Highway(size) for _ in range(4)))
        self.rnn = nn.GRU(size, size, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, size, T]; [B, T, 2 size]."""
        steps = x.shape[-1]
        bank = torch.cat([convolution(x)[..., :steps] for convolution in self.bank], dim=1)
        maps = self.project(self.pool(bank)[..., :steps]) + x
        return self.rnn(self.highways(maps.transpose(1, 2)))[0]


class ConvolutionGru(nn.Module):
    """The classifier of pytorch#5912: Conv1d and a GRU over a long sequence."""

    def __init__(self, inputs: int = 64, size: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(inputs, size, 5, padding=2)
        self.rnn = nn.GRU(size, size, batch_first=True)
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, inputs, T]."""
        maps = torch.relu(self.convolution(x)).transpose(1, 2)
        return self.head(self.rnn(maps)[0][:, -1])


class StreamingGru(nn.Module):
    """Speech enhancement frame by frame, as DeepFilterNet's encoder: the state comes and goes."""

    def __init__(self, bands: int = 32, channels: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, (1, 3), (1, 2), (0, 1), groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.rnn = nn.GRU(channels * bands // 2, hidden, 2, batch_first=True)
        self.mask = nn.Linear(hidden, bands)

    def forward(self, frame: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """frame: [B, 1, 1, bands], state: [2, B, hidden]; a mask and the next state."""
        maps = self.encode(frame).transpose(1, 2).flatten(2)
        out, state = self.rnn(maps, state)
        return torch.sigmoid(self.mask(out)), state


class TableHead(nn.Module):
    """Table structure by an attention GRU cell that looks at all positions, as SLANeXt's head."""

    def __init__(self, features: int = 96, hidden: int = 256, classes: int = 50, steps: int = 40):
        super().__init__()
        self.keys, self.query = nn.Linear(features, hidden, bias=False), nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.cell = nn.GRUCell(features + classes, hidden)
        self.head = nn.Linear(hidden, classes)
        self.steps, self.classes = steps, classes

    def forward(self, maps: Tensor) -> Tensor:
        """maps: [B, S, features]; logits [B, steps, classes]."""
        state = maps.new_zeros(len(maps), self.cell.hidden_size)
        word = maps.new_zeros(len(maps), self.classes)
        keys, logits = self.keys(maps), []
        for _ in range(self.steps):
            scores = self.score(torch.tanh(keys + self.query(state)[:, None]))
            context = (scores.softmax(1).transpose(1, 2) @ maps)[:, 0]
            state = self.cell(torch.cat([context, word], 1), state)
            logits.append(self.head(state))
            word = F.one_hot(logits[-1].argmax(-1), self.classes).to(maps.dtype)
        return torch.stack(logits, 1)


class Forecaster(nn.Module):
    """A GRU encoder and a small decoder, as neuralforecast's GRU."""

    def __init__(self, inputs: int = 8, hidden: int = 128, horizon: int = 24) -> None:
        super().__init__()
        self.rnn = nn.GRU(inputs, hidden, 2, batch_first=True)
        self.decode = nn.Sequential(nn.Linear(hidden, 128), nn.ReLU(), nn.Linear(128, horizon))

    def forward(self, series: Tensor) -> Tensor:
        """series: [B, T, inputs]."""
        return self.decode(self.rnn(series)[0][:, -1])


def _drawn(*shapes: tuple[int, ...], batch_dim: tuple[int, ...] = (0,)) -> Callable[[int], Inputs]:
    """Inputs of these shapes; batch_dim says of each where the batch stands."""

    def make(batch: int) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        found = []
        for shape, at in zip(shapes, batch_dim, strict=True):
            sizes = (*shape[:at], batch, *shape[at:])
            found.append(torch.randn(sizes, generator=generator))
        return tuple(found)

    return make


OWN = (
    Entry("DeepSpeech2", DeepSpeech2, _drawn((1, 161, 200)), images=False),
    Entry("Tacotron CBHG", Cbhg, _drawn((128, 100)), images=False),
    Entry("Conv1d + GRU T2048", ConvolutionGru, _drawn((64, 2048)), images=False),
    Entry(
        "streaming GRU",
        StreamingGru,
        _drawn((1, 1, 32), (2, 256), batch_dim=(0, 1)),
        images=False,
    ),
    Entry("SLANeXt head", TableHead, _drawn((256, 96)), images=False),
    Entry("GRU forecaster", Forecaster, _drawn((96, 8)), images=False),
)
TORCHVISION = (
    "resnet18",
    "resnet50",
    "vgg11",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "densenet121",
)
TIMM = ("efficientnet_lite0", "seresnet18", "regnetx_002", "convnext_atto")
ENTRIES = {
    entry.name: entry for entry in (*OWN, *map(_of_torchvision, TORCHVISION), *map(_of_timm, TIMM))
}
