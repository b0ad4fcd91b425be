"""A Lightning callback that trains by mbm_kernels and hands back the model as it was.

    trainer = lightning.Trainer(callbacks=[MbmKernels()])

Modules keep their parameters, so that optimizers made before and checkpoints stay valid. Batches
that are lists start with the model's input; pass `sample` where yours are made otherwise.
"""

from collections.abc import Callable
from typing import Any

import mbm_kernels

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:  # the hooks below are all that a trainer calls

    class Callback: ...


class MbmKernels(Callback):
    def __init__(self, sample: Callable[[Any], Any] = lambda batch: batch[0], **options: Any):
        self.sample, self.options = sample, options
        self.report: mbm_kernels.Report | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.report is None:
            given = {"sample_input": self.sample(batch), "mode": "training", **self.options}
            self.report = mbm_kernels.optimize(module, **given)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        if self.report is not None:
            print(self.report)
            self.report.revert()
            self.report = None
