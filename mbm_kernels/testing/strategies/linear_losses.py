"""Drawn inputs of linear_cross_entropy and linear_distillation_loss."""

import torch
from torch import Tensor

from mbm_kernels.testing.draws import COLUMNS, DEPTH, Draws, Inputs, draws

IGNORED = -100


def _targets(given: Draws, classes: int, lead: tuple[int, ...]) -> Tensor:
    target = given.integers(0, classes, *lead)
    share = given.of(0.0, 0.3, 0.9)
    target[torch.rand(lead, generator=given.generator) < share] = IGNORED
    if bool((target == IGNORED).all()):
        target.view(-1)[0] = 0
    return target


@draws
def linear_cross_entropy(given: Draws) -> Inputs:
    features, classes = given.size(DEPTH), given.size(4 * COLUMNS, 40)
    lead = given.lead(given.size(COLUMNS))
    return {
        "hidden": given.randn(*lead, features) * given.scale,
        "weight": given.randn(classes, features) * features**-0.5,
        "target": _targets(given, classes, lead),
        "bias": given.randn(classes) if given.flag() else None,
        "label_smoothing": given.of(0.0, 0.0, 0.1),
        "softcap": given.of(None, None, 2.5),
        "z_loss": given.of(0.0, 0.0, 0.1),
        "reduction": given.of("mean", "sum", "none"),
    }


@draws
def linear_distillation_loss(given: Draws) -> Inputs:
    features, classes = given.size(DEPTH), given.size(4 * COLUMNS, 40)
    lead = given.lead(given.size(COLUMNS))
    inputs: Inputs = {
        "student_hidden": given.randn(*lead, features) * given.scale,
        "student_weight": given.randn(classes, features) * features**-0.5,
        "target": _targets(given, classes, lead),
        "student_bias": given.randn(classes) if given.flag() else None,
    }
    match given.of("hidden", "hidden", "logits", "topk"):
        case "hidden":
            width = given.size(DEPTH)
            inputs["teacher_hidden"] = given.randn(*lead, width)
            inputs["teacher_weight"] = given.randn(classes, width) * width**-0.5
            inputs["teacher_bias"] = given.randn(classes) if given.flag() else None
        case "logits":
            inputs["teacher_logits"] = 2 * given.randn(*lead, classes)
        case "topk":
            values = (2 * given.randn(*lead, classes)).log_softmax(-1)
            log_probs, ids = values.topk(given.between(1, min(classes, 20)))
            inputs["teacher_topk"] = (ids, log_probs)
    return inputs | {
        "temperature": given.of(1.0, 2.0, 0.7),
        "hard_weight": given.of(0.5, 0.5, 0.0, 1.0),
        "divergence": given.of("forward_kl", "reverse_kl", "jsd"),
        "beta": given.of(0.5, 0.3, 0.0, 1.0),
        "reduction": given.of("mean", "sum", "none"),
    }
