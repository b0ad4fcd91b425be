"""The work of distillation over two projections, by each backend."""

from mbm_kernels._core.cost import Sizes, Work, share


def _amounts(p: Sizes) -> dict[str, float]:
    threads, rows, classes = p["threads"], p["N"], p["V"]
    weights = classes * (p["H"] + p["H_teacher"])
    logits = rows * classes
    return {
        "calls": 1,
        "forks": int(threads > 1),
        "products": share(p["products"], threads),
        "teacher_products": share(logits * p["H_teacher"], threads),
        "logits": share(logits, threads),
        "other_divergence": share(logits, threads) if p["divergence"] else 0,
        "ids": share(rows * p["k"], threads),
        "logits_beyond_cache": logits if 8 * logits > p["cache"] else 0,
        "weights": share(weights, threads),
        "weights_beyond_cache": weights if 4 * weights > p["cache"] else 0,
        "rows": share(rows, threads),
        "classes": classes,
    }


def _teacher(p: Sizes) -> str:
    return "top-k" if p["k"] else "hidden" if p["H_teacher"] else "logits"


def cpu(p: Sizes) -> Work:
    return Work(_teacher(p), _amounts(p))


torch = cpu  # the same work, at its own constants
