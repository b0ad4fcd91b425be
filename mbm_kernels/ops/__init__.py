"""The operations; one folder each. This list is also the library's public functions."""

from mbm_kernels.ops.additive_attention import additive_attention

__all__ = [
    "additive_attention",
]
