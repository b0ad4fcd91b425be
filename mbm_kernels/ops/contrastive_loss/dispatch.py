"""The work of a contrastive loss over all pairs of a batch, by each backend."""

from mbm_kernels._core.cost import Sizes, Work, share


def _amounts(p: Sizes) -> dict[str, float]:
    threads, pairs = p["threads"], p["B"] ** 2
    return {
        "calls": 1,
        "forks": int(threads > 1),
        "products": share(pairs * p["D"], threads),
        "pairs": share(pairs, threads),
        "pairs_beyond_cache": pairs if 4 * pairs > p["cache"] else 0,
        "sides": share(p["B"] * p["D"], threads),
        "rows": p["B"],
    }


def _kind(p: Sizes) -> str:
    return "pairs siglip" if p["siglip"] else "pairs infonce"


def cpu(p: Sizes) -> Work:
    return Work(_kind(p), _amounts(p))


torch = cpu  # the same work, at its own constants
