"""Drop-in modules: the constructors and state_dict of torch.nn plus `backend="auto"`."""

from mbm_kernels.ops.additive_attention.module import AdditiveAttention as AdditiveAttention
