"""A model's parameters as inputs of a benchmark, so that every form of it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mbm_kernels.bench.limits import Work

PREFIX = "model."
WINOGRAD_SAVES = 0.75  # of the products of a 3x3 convolution with stride 1

Model = TypeVar("Model", bound=nn.Module)


def drawn(build: Callable[[], nn.Module], generator: torch.Generator) -> dict[str, Any]:
    """The parameters of a model as it starts from a seed drawn by `generator`, by prefixed name."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = build()
    return {PREFIX + name: p.detach() for name, p in model.named_parameters()}


def names(inputs: dict[str, Any]) -> list[str]:
    return [name for name in inputs if name.startswith(PREFIX)]


def holding(model: Model, inputs: dict[str, Any], like: torch.Tensor) -> Model:
    """The model with the inputs for its parameters, on the device and in the dtype of `like`."""
    model = model.to(device=like.device, dtype=like.dtype)
    for name in names(inputs):
        path, _, leaf = name.removeprefix(PREFIX).rpartition(".")
        setattr(model.get_submodule(path), leaf, inputs[name])
    return model


def reference_of(
    build_from: Callable[[str], Callable[[dict[str, Any]], Any]],
) -> Callable[..., Any]:
    """The reference of a benchmark of models: the one of stock layers, called.

    build_from(layers) gives a function of the inputs that returns what is called and its arguments.
    """

    def definition(**inputs: Any) -> Any:
        called, arguments = build_from("stock")(inputs)
        return called(**arguments)

    return definition


def work(model: nn.Module, run: Callable[[], Any], moved: int, backward: bool) -> Work:
    """Products of one run on meta tensors; weights once, their gradients and updates twice more.

    moved: elements of the images and other large inputs. Convolutions are 3x3 with stride 1.
    """
    weights = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        run()
    operations = counter.get_total_flops()
    counts = counter.get_flop_counts()["Global"]
    convolved = sum(n for name, n in counts.items() if "convolution" in str(name))
    elements = moved + (3 if backward else 1) * weights
    return Work(operations, 4 * elements, fewest=operations - WINOGRAD_SAVES * convolved)
