"""The work of a projection to a vocabulary and the search for its largest, by each backend."""

from mbm_kernels._core.cost import Sizes, Work, share


def _amounts(p: Sizes) -> dict[str, float]:
    threads, rows, features, classes = p["threads"], p["R"], p["H"], p["V"]
    weights = features * classes
    return {
        "calls": 1,
        "forks": int(threads > 1),
        "products": share(rows * weights, threads),
        "weights": share(weights, threads),
        "weights_beyond_cache": weights if 4 * weights > p["cache"] else 0,
        "logits": share(rows * classes, threads),
        "kept": share(rows * classes, threads) * p["k"],
        "rows": rows,
        "classes": classes,
    }


def cpu(p: Sizes) -> Work:
    return Work("rows few" if p["R"] < 8 else "rows many", _amounts(p))


torch = cpu  # the same work, at its own constants
