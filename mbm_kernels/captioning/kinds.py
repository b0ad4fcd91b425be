"""The kinds of models that a run's folder may hold, each with what tells it from the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from mbm_kernels.models import (
    Captioner,
    CaptionerConfig,
    MultimodalBigModel,
    MultimodalConfig,
    TwoTower,
    TwoTowerConfig,
)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Kind(Generic[Model]):
    """A model's class and what a checkpoint of it looks like.

    format: in config.json. noun: in messages. command: of mbm-kernels, which trains one. build: the
    model from `layers` and its settings, raising ValueError or TypeError for impossible ones.
    settings: the type of each setting in JSON. usage: Markdown for a model card, with {run} for the
    run's folder. head: which tells models of one class apart, None where there is one kind.
    pipeline: the model hub's name of the task. older: the settings of checkpoints of earlier
    versions.
    """

    model: type[Model]
    format: str
    noun: str
    command: str
    build: Callable[..., Model]
    settings: Mapping[str, type]
    usage: str
    head: str | None = None
    pipeline: str | None = None
    older: Mapping[str, type] | None = None

    def holds(self, model: nn.Module) -> bool:
        """Whether a model is of this kind."""
        heads: Any = getattr(model, "heads", ())
        return isinstance(model, self.model) and (self.head is None or self.head in heads)

    def describes(self, settings: Mapping[str, Any]) -> bool:
        """Whether these are settings by name and type."""
        types = {name: type(value) for name, value in settings.items()}
        return types in (self.settings, self.older)


def _captioner(
    *, layers: str, vocab_size: int, config: dict[str, Any] | None = None, **others: Any
) -> Captioner:
    given = None if config is None else CaptionerConfig.from_dict(config)
    return Captioner(vocab_size, config=given, layers=layers, **others)


def _two_tower(*, layers: str, vocab_size: int, config: dict[str, Any]) -> TwoTower:
    return TwoTower(vocab_size, config=TwoTowerConfig.from_dict(config), layers=layers)


def _multimodal(*, layers: str, config: dict[str, Any]) -> MultimodalBigModel:
    return MultimodalBigModel(MultimodalConfig.from_dict(config), layers=layers)


IDS = {"pad_id": int, "bos_id": int, "eos_id": int}
CAPTIONER = Kind(
    Captioner,
    "mbm_kernels.captioner",
    "captioner",
    "caption train",
    _captioner,
    {"vocab_size": int, "config": dict, **IDS},
    """\
```sh
mbm-kernels caption generate {run} photo.jpg
```

```python
from mbm_kernels.captioning import Captioner

captioner = Captioner.from_pretrained("{run}")
print(captioner.generate(["photo.jpg"], beam=3))
```""",
    pipeline="image-to-text",
    older={"vocab_size": int, "size": str, "attention": str, "image_size": int, **IDS},
)
TWO_TOWER = Kind(
    TwoTower,
    "mbm_kernels.two_tower",
    "two-tower model",
    "retrieve train",
    _two_tower,
    {"vocab_size": int, "config": dict},
    """\
```sh
mbm-kernels retrieve index PICTURES --model {run} --out pictures.index
mbm-kernels retrieve query pictures.index "a large red star"
```""",
)
MULTIMODAL = Kind(
    MultimodalBigModel,
    "mbm_kernels.multimodal",
    "multimodal model",
    "retrieve match",
    _multimodal,
    {"config": dict},
    """\
```sh
mbm-kernels retrieve match-eval {run}
```""",
    head="similarity",
)
DRIVER = Kind(
    MultimodalBigModel,
    "mbm_kernels.driver",
    "driver",
    "drive train",
    _multimodal,
    {"config": dict},
    """\
```sh
mbm-kernels drive eval {run}
```""",
    head="control",
)
KINDS: tuple[Kind[Any], ...] = (CAPTIONER, TWO_TOWER, MULTIMODAL, DRIVER)


def kind_of(model: nn.Module) -> Kind[Any]:
    return next(kind for kind in KINDS if kind.holds(model))
