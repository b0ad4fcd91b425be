"""Calls every operation's compiled kernels where nothing but the package and torch is installed.

`python tests/wheel/calls.py`: it prints how long the first call took, import included, and fails if
a kernel is missing, gives another result than PyTorch, or a process (a compiler) is started.
"""

import sys
import time

started: list[str] = []
sys.addaudithook(
    lambda event, args: (
        started.append(f"{event} {args[0]}")
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
        else None
    )
)

import torch  # noqa: E402

begin = time.perf_counter()

import mbm_kernels  # noqa: E402
from mbm_kernels._core.op import OPS  # noqa: E402
from mbm_kernels.ops.gru.bidirectional import gru_bidirectional  # noqa: E402
from mbm_kernels.ops.linear_topk import linear_topk  # noqa: E402


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def weights(c: int, h: int) -> tuple[torch.Tensor, ...]:
    return randn(3 * h, c), randn(3 * h, h), randn(3 * h), randn(3 * h)


TARGET = torch.tensor([3, 0, -100, 29])
CALLS = {
    "additive_attention": ((randn(2, 3, 8), randn(2, 5, 8), randn(2, 5, 4), randn(8)), {}),
    "concat_linear": (([randn(2, 5, 3), randn(2, 1, 4)], randn(6, 7), randn(6)), {}),
    "contrastive_loss": ((randn(5, 8), randn(5, 8), torch.tensor(2.0)), {}),
    "conv_bias_act": (
        (randn(2, 3, 9, 8), randn(4, 3, 3, 3), randn(4)),
        {"padding": 1, "activation": "relu", "max_pool": 2},
    ),
    "cross_attention": ((randn(2, 2, 3, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8)), {}),
    "gru": ((randn(4, 2, 5), randn(2, 7), *weights(5, 7)), {}),
    "gru_bidirectional": (
        (randn(4, 2, 5), randn(2, 2, 7), *weights(5, 7), *weights(5, 7)),
        {},
    ),
    "gru_cell": ((randn(2, 5), randn(2, 7), *weights(5, 7)), {}),
    "linear_cross_entropy": ((randn(4, 8), randn(30, 8), TARGET), {}),
    "linear_distillation_loss": (
        (randn(4, 8), randn(30, 8), TARGET),
        {"teacher_hidden": torch.randn(4, 16), "teacher_weight": torch.randn(30, 16)},
    ),
    "linear_topk": ((torch.randn(4, 8), torch.randn(30, 8), None, 3), {}),
}
INTERNAL = {"gru_bidirectional": gru_bidirectional, "linear_topk": linear_topk}


def results(op: str, backend: str) -> list[torch.Tensor]:
    """Outputs, and gradients of their sum."""
    arguments, options = CALLS[op]
    function = INTERNAL[op] if op in INTERNAL else getattr(mbm_kernels, op)
    found = function(*arguments, **options, backend=backend)
    outputs = [found] if isinstance(found, torch.Tensor) else list(found)
    flat = [x for a in arguments for x in (a if isinstance(a, list) else [a])]
    leaves = [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]
    if not leaves:
        return outputs
    return outputs + list(torch.autograd.grad(sum(o.sum() for o in outputs), leaves))


def main() -> None:
    assert set(CALLS) == set(OPS), set(CALLS) ^ set(OPS)
    results("gru", "cpu")
    print(f"first call after {time.perf_counter() - begin:.2f} s, import included, torch's not")
    for op in CALLS:
        for ours, stock in zip(results(op, "cpu"), results(op, "torch"), strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4)
    assert not started, started
    print(f"{len(CALLS)} operations, {mbm_kernels.__file__}")


if __name__ == "__main__":
    main()
