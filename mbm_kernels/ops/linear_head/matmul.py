"""Matrix products with float32 results, for Triton backends."""

import torch
from torch import Tensor


def _is_mixed(a: Tensor) -> bool:
    """Whether the GPU's GEMM takes `a` as it is and gives float32; elsewhere it is converted."""
    return a.dtype != torch.float32 and a.is_cuda and torch.version.hip is None


def product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a b in float32, not rounded to the dtype of a and b; added to `out` where `add` says so."""
    if _is_mixed(a):
        if add:
            assert out is not None
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
            return out
        if out is not None:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
            return out
        return torch.mm(a, b, out_dtype=torch.float32)
    a, b = a.float(), b.float()
    if add:
        assert out is not None
        return out.addmm_(a, b)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
