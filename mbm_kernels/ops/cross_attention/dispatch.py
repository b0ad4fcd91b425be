"""The work of scaled dot-product attention, by each backend."""

from mbm_kernels._core.cost import Sizes, Work, padded, share


def _amounts(p: Sizes) -> dict[str, float]:
    threads, heads = p["threads"], p["B"] * p["N"]
    scores = heads * p["T"] * p["S"]
    features = p["D"] + p["E"]
    return {
        "calls": 1,
        "forks": int(threads > 1),
        "products": share(
            scores * (padded(p["D"], p["lanes"]) + padded(p["E"], p["lanes"])), threads
        ),
        "scores": share(scores, threads),
        "scores_beyond_cache": scores if 4 * scores > p["cache"] else 0,
        "keys": share(heads * p["S"] * features, threads),
        "queries": share(heads * p["T"] * features, threads),
        "heads": share(heads, threads),
        "rows": share(heads * p["T"], threads),
    }


def _form(p: Sizes) -> str:
    return ("weights" if p["weights"] else "context") + (" masked" if p["masked"] else "")


def cpu(p: Sizes) -> Work:
    return Work(_form(p), _amounts(p))


torch = cpu  # the same work, at its own constants
