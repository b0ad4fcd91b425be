"""How tables write what rows hold."""

from mbm_kernels.bench.benchmark import FORWARD


def milliseconds(value: float) -> str:
    """Milliseconds in three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def short_pass(name: str) -> str:
    return "fwd" if name == FORWARD else "fwd+bwd"
