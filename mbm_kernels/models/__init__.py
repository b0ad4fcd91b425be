"""Models built from the package's operations or from stock PyTorch layers."""

from mbm_kernels.models.captioner import Captioner, CaptionerOutput
from mbm_kernels.models.captioner_config import CaptionerConfig
from mbm_kernels.models.multimodal import MultimodalBigModel, MultimodalConfig
from mbm_kernels.models.sampling import Sampling
from mbm_kernels.models.two_tower import TwoTower, TwoTowerConfig

__all__ = [
    "Captioner",
    "CaptionerConfig",
    "CaptionerOutput",
    "MultimodalBigModel",
    "MultimodalConfig",
    "Sampling",
    "TwoTower",
    "TwoTowerConfig",
]
