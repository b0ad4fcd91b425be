"""The work of cross-entropy over a projection, by each backend."""

from mbm_kernels._core.cost import Sizes, Work, share


def _amounts(p: Sizes) -> dict[str, float]:
    threads, rows, features, classes = p["threads"], p["N"], p["H"], p["V"]
    return {
        "calls": 1,
        "forks": int(threads > 1),
        "products": share(p["products"], threads),
        "logits": share(rows * classes, threads),
        "logits_beyond_cache": rows * classes if 4 * rows * classes > p["cache"] else 0,
        "weights": share(features * classes, threads),
        "weights_beyond_cache": features * classes if 4 * features * classes > p["cache"] else 0,
        "hidden": share(rows * features, threads),
        "rows": share(rows, threads),
        "classes": classes,
    }


def cpu(p: Sizes) -> Work:
    return Work("tiled", _amounts(p))


def torch(p: Sizes) -> Work:
    return Work("logits", _amounts(p))
