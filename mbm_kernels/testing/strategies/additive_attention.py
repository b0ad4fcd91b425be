"""Drawn inputs of additive_attention."""

from mbm_kernels.testing.draws import COLUMNS, POSITIONS, Draws, Inputs, draws


@draws
def additive_attention(given: Draws) -> Inputs:
    batch = given.between(1, 3)
    chunk = given.flag()  # past a chunk of queries, or past a piece of keys: both take too long
    steps = given.size(POSITIONS if chunk else 4)
    positions = given.size(4 if chunk else POSITIONS)
    features, values = given.size(128), given.size(COLUMNS)
    inputs: Inputs = {
        "query": given.randn(batch, steps, features) * given.scale,
        "key": given.randn(batch, positions, features) * given.scale,
        "value": given.randn(batch, positions, values),
        "v": given.randn(features) * features**-0.5,
        "key_lengths": given.lengths(batch, positions),
        "mask": given.mask(
            (batch, steps, positions), (batch, 1, positions), (steps, positions), (positions,)
        ),
    }
    return inputs
