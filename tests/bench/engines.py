"""Engines that tests put in place of the real ones."""

import time

import pytest
import torch

from mbm_kernels import engines
from mbm_kernels.engines import running


class FakeSession(engines.Session):
    def __init__(self, model, scale, seconds):
        self.model, self.scale, self.seconds = model, scale, seconds

    def run(self):
        time.sleep(self.seconds)
        with torch.no_grad():
            self.found = engines.flat(self.model.module(*self.model.inputs))
        return self.found

    def outputs(self):
        self.run()
        return [y * self.scale if y.is_floating_point() else y for y in self.found]


class Fake(engines.Engine):
    """PyTorch itself, `scale` times the right result, and so much slower."""

    package = module = "torch"

    def __init__(self, name, scale=1.0, seconds=0.0, pytorch=False, failing=None, absent=None):
        self.name, self.scale, self.seconds = name, scale, seconds
        self.pytorch, self.failing, self.absent = pytorch, failing, absent
        self.threads = []

    def why_not(self):
        return self.absent

    def version(self):
        return "1.2"

    def build(self, model, threads):
        self.threads.append(threads)
        if self.failing:
            raise RuntimeError(f"{self.failing}\nlong story")
        return FakeSession(model, self.scale, self.seconds)


@pytest.fixture
def fakes(monkeypatch):
    """Lets a list of fake engines stand for all that there are."""

    def put(*some):
        named = {engine.name: engine for engine in some}
        monkeypatch.setattr(running, "ENGINES", named)
        monkeypatch.setattr(engines, "ENGINES", named)

    return put
