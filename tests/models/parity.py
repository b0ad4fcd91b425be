"""A model of this package's layers against the same of stock layers, by the rule of errors."""

import copy

import torch

from mbm_kernels.ops.conv_bias_act.backend_cpu import WINOGRAD_ERROR
from mbm_kernels.testing.errors import assert_matches, max_abs


def evaluate(model, call, dtype):
    """Outputs, and the gradients of their sum weighted at random, by name."""
    model.zero_grad()
    outputs = call(model, lambda x: x.to(dtype) if x.is_floating_point() else x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
        for x in outputs
    )
    total.backward()
    found = {f"output {k}": x.detach() for k, x in enumerate(outputs)}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, gradients


def assert_parity(stock, fused, call):
    """`call(model, cast)` gives outputs; both models get the weights of `stock`."""
    for parameter in fused.parameters():
        torch.nn.init.zeros_(parameter)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (stock, fused)]
    assert shapes[0] == shapes[1]
    fused.load_state_dict(stock.state_dict())
    truth = evaluate(copy.deepcopy(stock).double(), call, torch.float64)
    yardstick, actual = (evaluate(m, call, torch.float32) for m in (stock, fused))
    has_convolutions = any(isinstance(m, torch.nn.Conv2d) for m in stock.modules())
    extra = WINOGRAD_ERROR if has_convolutions else 0.0
    for gradient, (ours, exact, theirs) in enumerate(zip(actual, truth, yardstick, strict=True)):
        assert ours.keys() == exact.keys() == theirs.keys()
        largest = max(exact.values(), key=max_abs)
        for name in exact:
            assert_matches(
                ours[name],
                exact[name],
                theirs[name],
                largest,
                gradient=bool(gradient),
                extra=extra,
                what=name,
            )
