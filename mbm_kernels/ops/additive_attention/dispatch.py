"""The work of additive attention, by each backend."""

from mbm_kernels._core.cost import Sizes, Work, share


def _amounts(p: Sizes) -> dict[str, float]:
    threads, scores = p["threads"], p["B"] * p["T"] * p["S"]
    elements = scores * p["D"]
    return {
        "calls": 1,
        "forks": int(threads > 1),
        "elements": share(elements, threads),
        "elements_beyond_cache": elements if 4 * elements > p["cache"] else 0,
        "scores": share(scores, threads),
        "context": share(scores * p["E"], threads),
        "keys": share(p["B"] * p["S"] * (p["D"] + p["E"]), threads),
        "queries": share(p["B"] * p["T"] * (p["D"] + p["E"]), threads),
        "batch": share(p["B"], threads),
    }


def cpu(p: Sizes) -> Work:
    return Work("fused", _amounts(p))


def torch(p: Sizes) -> Work:
    return Work("unfused", _amounts(p))
