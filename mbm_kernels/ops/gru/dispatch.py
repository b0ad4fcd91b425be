"""The work of a GRU over a sequence, by each backend."""

from mbm_kernels._core.cost import Sizes, Work, share
from mbm_kernels.ops.gru import steps_cpu
from mbm_kernels.ops.gru_cell import dispatch as gru_cell


def _amounts(p: Sizes) -> dict[str, float]:
    steps, batch, hidden, threads = p["T"], p["B"], p["H"], p["threads"]
    recurrent = 3 * hidden * hidden
    streamed = steps * share(recurrent, threads)
    return {
        "calls": 1,
        "steps": steps,
        "barriers": steps if threads > 1 else 0,
        "projected": share(3 * steps * batch * hidden * p["C"], threads),
        "recurrent": share(steps * batch * recurrent, threads),
        "streamed": streamed,
        "streamed_far": streamed if 4 * share(recurrent, threads) > p["near_cache"] else 0,
        "gates": share(steps * batch * hidden, threads),
        "weights": 3 * hidden * (p["C"] + hidden),
        "x": share(steps * batch * p["C"], threads),
    }


def cpu(p: Sizes) -> Work:
    if steps_cpu.take(p["T"], p["B"], p["C"], p["H"], saved=bool(p["training"])):
        step = gru_cell.cpu(p)
        amounts = {name: p["T"] * amount for name, amount in step.amounts.items()}
        return Work(step.kernel.replace("rows", "steps"), amounts)
    return Work("rows few" if p["B"] < 8 else "rows many", _amounts(p))


def torch(p: Sizes) -> Work:
    return Work("steps", _amounts(p))
