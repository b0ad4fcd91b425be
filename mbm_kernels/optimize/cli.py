"""`mbm-kernels optimize` and `explain`: a model from a package or a file, and what it becomes."""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from mbm_kernels.explaining import explain as explain_model
from mbm_kernels.optimize.optimizing import MODES, POLICIES
from mbm_kernels.optimize.optimizing import optimize as optimize_model
from mbm_kernels.optimize.packages import package
from mbm_kernels.optimize.racing import beside_engines

Model = Annotated[
    str,
    typer.Argument(
        help="torchvision:NAME, timm:NAME, or FILE.py:FUNCTION, a function without arguments that "
        "returns the model, or the model and a tuple of its inputs.",
        metavar="MODEL",
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images in the sample.")]
Size = Annotated[
    int | None, typer.Option("--size", min=1, help="Pixels a side; without it 224 or timm's.")
]
Mode = Annotated[str, typer.Option("--mode", help=" or ".join(MODES))]
Policy = Annotated[str, typer.Option("--policy", help=", ".join(POLICIES))]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Engines = Annotated[
    bool,
    typer.Option(
        "--engines",
        help="Time the whole model beside PyTorch and the inference engines of '.[peers]', too.",
    ),
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Time each call by every backend that runs it, too.")
]
Freeze = Annotated[
    bool, typer.Option("--freeze", help="Take weights for constants, as engines do.")
]
Html = Annotated[Path | None, typer.Option("--html", help="Write the report to this file, too.")]


def optimize(
    model: Model,
    batch: Batch = 1,
    size: Size = None,
    mode: Mode = "inference",
    policy: Policy = "auto",
    as_json: AsJson = False,
    html: Html = None,
    engines: Engines = False,
    freeze: Freeze = False,
) -> None:
    """What a model's modules become, with what they gain, and which stay and why."""
    if engines and mode != "inference":
        raise ValueError(
            f"engines: got mode {mode!r}; expected inference, all that engines do; leave one out"
        )
    made, inputs = _called(model, batch, size)
    made.train(mode == "training")
    report = optimize_model(made, mode=mode, policy=policy, sample_input=inputs, freeze=freeze)
    if engines:
        report.beside = beside_engines(made, inputs)
    if html is not None:
        report.to_html(html)
    typer.echo(report.to_json() if as_json else str(report))


def explain(
    model: Model,
    batch: Batch = 1,
    size: Size = None,
    measure: Measure = False,
    as_json: AsJson = False,
) -> None:
    """Which backend each call of a model takes in inference, predicted times, why not others."""
    made, inputs = _called(model, batch, size)
    with torch.no_grad():
        found = explain_model(made.eval(), *inputs, measure=measure)
    typer.echo(found.to_json() if as_json else str(found))


def _called(spec: str, batch: int, size: int | None) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model, and what it is called with: images where it says nothing else."""
    torch.manual_seed(0)
    made, inputs, pixels = _made(spec)
    side = size or pixels
    return made, (torch.randn(batch, 3, side, side),) if inputs is None else inputs


def _made(spec: str) -> tuple[nn.Module, tuple[Any, ...] | None, int]:
    """The model of a specification, its inputs if it comes with them, and its images' side."""
    source, colon, name = spec.rpartition(":")
    if not colon or not name:
        raise ValueError(
            f"MODEL: got {spec!r}; expected torchvision:NAME, timm:NAME or FILE.py:FUNCTION; "
            "say which model of it"
        )
    if source == "torchvision":
        models: Any = package("torchvision").models
        return models.get_model(name, weights=None), None, 224
    if source == "timm":
        found = package("timm").create_model(name, pretrained=False)
        return found, None, int(found.default_cfg["input_size"][-1])
    return (*_from_file(Path(source), name), 224)


def _from_file(path: Path, function: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"MODEL: got {str(path)!r}; expected torchvision, timm or a Python file; check the path"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"MODEL: got {function!r}; expected a function of {path}; check the name")
    found = make()
    model, inputs = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"MODEL: got {type(model).__name__} from {function}(); expected a torch.nn.Module; "
            "return the model, or the model and its inputs"
        )
    if inputs is not None and not isinstance(inputs, (tuple, list)):
        inputs = (inputs,)
    return model, None if inputs is None else tuple(inputs)
