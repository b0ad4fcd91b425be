"""Packages that models come from."""

import importlib
import sys
from types import ModuleType

import torch

_library: list[torch.library.Library] = []  # it lives as long as used


def torchvision() -> ModuleType:
    """torchvision, also where its C++ operations do not load: its classifiers call none of them.

    Its CUDA wheel beside a CPU torch is such a case; importing it asks for two schemas.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.append(library)
        return importlib.import_module("torchvision")


def package(name: str) -> ModuleType:
    """
    Raises:
        ImportError: where it is not installed, with the remedy.
    """
    try:
        return torchvision() if name == "torchvision" else importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(
            f"MODEL: got a model of {name}, which is not installed; expected the package; "
            f"run pip install {name}"
        ) from None
