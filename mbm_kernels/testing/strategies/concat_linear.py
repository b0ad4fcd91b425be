"""Drawn inputs of concat_linear."""

from mbm_kernels.testing.draws import COLUMNS, DEPTH, ROWS, Draws, Inputs, draws


@draws
def concat_linear(given: Draws) -> Inputs:
    batch, steps = given.between(2, 4), given.size(ROWS)
    leads = given.of(
        ((batch, steps), (batch, 1)),
        ((batch, 1), (batch, steps)),
        ((batch, steps), (batch, steps)),
        ((batch, steps),),
        ((batch, steps), (1, steps), (batch, 1)),
        ((batch, 1), (steps,)),
        ((), (batch, steps)),
    )
    widths = [given.size(DEPTH, 37) for _ in leads]
    outputs = given.size(COLUMNS)
    return {
        "inputs": [
            given.randn(*lead, c) * given.scale for lead, c in zip(leads, widths, strict=True)
        ],
        "weight": given.randn(outputs, sum(widths)) * sum(widths) ** -0.5,
        "bias": given.randn(outputs) if given.flag() else None,
    }
