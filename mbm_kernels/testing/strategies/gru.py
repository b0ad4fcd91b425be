"""Drawn inputs of gru, gru_bidirectional and gru_cell."""

from mbm_kernels.testing.draws import COLUMNS, DEPTH, ROWS, Draws, Inputs, draws


def _gru_weights(given: Draws, inputs: int, units: int) -> Inputs:
    bound = units**-0.5  # the spread of a trained layer
    bias = given.flag()
    return {
        "w_ih": given.randn(3 * units, inputs) * bound,
        "w_hh": given.randn(3 * units, units) * bound,
        "b_ih": given.randn(3 * units) * bound if bias else None,
        "b_hh": given.randn(3 * units) * bound if bias else None,
    }


def _gru_sizes(given: Draws) -> tuple[int, int, int]:
    """Rows, inputs, units; units past the depth of a sum once in four, since they cost most."""
    deep = given.of(True, False, False, False)
    rows = given.of(1, given.size(ROWS), given.size(ROWS))
    return rows, given.size(DEPTH), given.size(DEPTH if deep else COLUMNS, 40)


@draws
def gru(given: Draws) -> Inputs:
    steps = given.between(1, 6)
    rows, inputs, units = _gru_sizes(given)
    return {
        "x": given.randn(steps, rows, inputs) * given.scale,
        "h0": given.randn(rows, units) if given.flag() else None,
        **_gru_weights(given, inputs, units),
        "lengths": given.lengths(rows, steps),
        "reverse": given.flag(),
    }


@draws
def gru_bidirectional(given: Draws) -> Inputs:
    steps = given.between(1, 6)
    rows, inputs, units = _gru_sizes(given)
    weights, others = _gru_weights(given, inputs, units), _gru_weights(given, inputs, units)
    return {
        "x": given.randn(steps, rows, inputs) * given.scale,
        "h0": given.randn(2, rows, units) if given.flag() else None,
        **weights,
        **{f"{name}_reverse": value for name, value in others.items()},
        "lengths": given.lengths(rows, steps),
    }


@draws
def gru_cell(given: Draws) -> Inputs:
    rows, inputs, units = _gru_sizes(given)
    x, h = given.randn(rows, inputs) * given.scale, given.randn(rows, units)
    return {"x": x, "h": h, **_gru_weights(given, inputs, units)}
