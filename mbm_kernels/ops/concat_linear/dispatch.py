"""The work of a projection of concatenated inputs, by each backend."""

from mbm_kernels._core.cost import Sizes, Work, padded, share
from mbm_kernels.ops.concat_linear.problem import FEW_ROWS


def _amounts(p: Sizes) -> dict[str, float]:
    threads = p["threads"]
    rows, features, out = p["rows"], p["C"], p["K"]
    return {
        "calls": 1,
        "inputs": p["inputs"],
        "forks": int(threads > 1),
        "products": share(p["elements"] // out * padded(out, p["lanes"]), threads),
        "whole_products": share(rows * features * padded(out, p["lanes"]), threads),
        "x": share(rows * features, threads),
        "y": share(rows * out, threads),
        "weights": features * out,
    }


def cpu(p: Sizes) -> Work:
    if p["shared"]:
        return Work("shared", _amounts(p))
    return Work("joined few" if p["rows"] <= FEW_ROWS else "joined", _amounts(p))


def torch(p: Sizes) -> Work:
    kernel = "one" if p["inputs"] == 1 else "shared" if p["shared"] else "joined"
    return Work(kernel, _amounts(p))
