"""Drawn inputs of linear_topk."""

from mbm_kernels.testing.draws import COLUMNS, DEPTH, ROWS, Draws, Inputs, draws


@draws
def linear_topk(given: Draws) -> Inputs:
    features, classes = given.size(DEPTH), given.size(8 * COLUMNS, 40)
    return {
        "hidden": given.randn(*given.lead(given.size(ROWS)), features) * given.scale,
        "weight": given.randn(classes, features) * features**-0.5,
        "bias": given.randn(classes) if given.flag() else None,
        "k": given.between(1, min(classes, 8)),
    }
