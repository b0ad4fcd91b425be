"""The work of one GRU step, by each backend."""

from mbm_kernels._core.cost import Sizes, Work, share


def _amounts(p: Sizes) -> dict[str, float]:
    batch, hidden, threads = p["B"], p["H"], p["threads"]
    weights = 3 * hidden * (p["C"] + hidden)
    return {
        "calls": 1,
        "forks": int(threads > 1),
        "products": share(batch * weights, threads),
        "weights": share(weights, threads),
        "weights_far": share(weights, threads) if 4 * weights > threads * p["near_cache"] else 0,
        "weights_whole": weights,
        "gates": share(batch * hidden, threads),
        "x": share(batch * p["C"], threads),
    }


def cpu(p: Sizes) -> Work:
    return Work("rows few" if p["B"] < 8 else "rows many", _amounts(p))


torch = cpu  # the same work, at its own constants
