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


def _rows(p: Sizes) -> str:
    return "rows few" if p["R"] < 8 else "rows many"


def cpu(p: Sizes) -> Work:
    return Work(_rows(p), _amounts(p))


def torch(p: Sizes) -> Work:
    """argmax reads the logits once; topk copies each with its index first, on one thread a row."""
    return Work(f"{_rows(p)}, {'argmax' if p['k'] == 1 else 'topk'}", _amounts(p))
