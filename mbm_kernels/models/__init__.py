"""Models built from the package's operations or from stock PyTorch layers."""

from mbm_kernels.models.captioner import Captioner, CaptionerOutput

__all__ = ["Captioner", "CaptionerOutput"]
