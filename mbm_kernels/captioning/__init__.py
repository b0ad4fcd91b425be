"""Training, distilling, scoring and using a captioner."""

from mbm_kernels.captioning.captioner import Caption, Captioner

__all__ = ["Caption", "Captioner"]
