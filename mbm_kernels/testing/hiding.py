"""What a mask or a length hides is not read: tests of every operation that has either."""

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mbm_kernels.testing.errors import assert_matches
from mbm_kernels.testing.inputs import Inputs, map_floating
from mbm_kernels.testing.poison import poison
from mbm_kernels.testing.suite import Case, Named, OpSuite, Run


class Hiding(OpSuite):
    """An OpSuite whose operation hides parts of its inputs."""

    hiding_cases: ClassVar[list[Case]]
    # Name, value and mode; a dispatch mode stands for all that lets no value be read.
    specials: ClassVar[list[tuple[str, float, Any]]] = [
        ("nan", torch.nan, nullcontext),
        ("inf", torch.inf, nullcontext),
        ("-inf", -torch.inf, nullcontext),
        ("nan, values unreadable", torch.nan, lambda: FlopCounterMode(display=False)),
    ]

    def unread(self, inputs: Inputs) -> tuple[Named, list[Tensor]]:
        """What nothing reads, True, broadcastable to what it is about: inputs, by their names, and
        the gradients that arrive for each output."""
        raise NotImplementedError

    def partly_read(self, inputs: Inputs) -> list[Inputs]:
        """`inputs` with a NaN that some results read and others do not, in several places."""
        return []

    def spoilt(self, inputs: Inputs, special: float) -> Inputs:
        """`inputs` with that value wherever nothing reads."""
        unread, _ = self.unread(inputs)
        hidden = {name: inputs[name].masked_fill(place, special) for name, place in unread.items()}
        return {**inputs, **hidden}

    def check_against_definition(
        self, given: Inputs, as_if: Inputs, backend: str, arriving: list[Tensor] | None = None
    ) -> Named:
        """The error rule for outputs and gradients of `given`, whose truth is the definition on
        `as_if`; where `arriving` is True a NaN arrives. Returns the outputs and gradients."""
        outputs = self.define(map_floating(as_if, Tensor.double))
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(o.shape, generator=generator) for o in outputs]
        spoilt = grads
        if arriving is not None:
            pairs = zip(grads, arriving, strict=True)
            spoilt = [g.masked_fill(nowhere, torch.nan) for g, nowhere in pairs]

        def both(run: Run, inputs: Inputs, grads: list[Tensor]) -> Named:
            with torch.no_grad():
                found = {f"output {i}": output for i, output in enumerate(run(inputs))}
            return found | self.gradients(run, inputs, grads)

        with poison():
            actual = both(lambda i: self.run(i, backend), given, spoilt)
        truth = both(self.define, map_floating(as_if, Tensor.double), grads)
        yardstick = both(self.define, as_if, grads)
        positive = map_floating(as_if, lambda x: x.double().abs())
        absolute = both(self.define, positive, [g.abs() for g in grads])
        for name in truth:
            results = (each[name] for each in (actual, truth, yardstick, absolute))
            assert_matches(*results, gradient=not name.startswith("output"), what=name)
        return actual

    def test_what_is_hidden_is_not_read(
        self, hiding_case: Case, special: float, mode: Any, backend: str
    ) -> None:
        inputs = self.inputs(hiding_case, torch.float32)
        unread, arriving = self.unread(inputs)
        assert any(bool(nowhere.any()) for nowhere in unread.values()), "hide something"
        spoilt = self.spoilt(inputs, special)
        with mode():
            found = self.check_against_definition(spoilt, inputs, backend, arriving)
        for name, nowhere in unread.items():
            if name in found:
                assert (found[name][nowhere.expand(found[name].shape)] == 0).all(), name

    def test_what_is_partly_hidden_spreads_no_further(
        self, hiding_case: Case, backend: str
    ) -> None:
        inputs = self.inputs(hiding_case, torch.float32)
        for spoilt in self.partly_read(inputs):
            self.check_against_definition(spoilt, spoilt, backend)


def unread_by_attention(attend: Tensor, weights: Tensor | None) -> tuple[Named, list[Tensor]]:
    """Hiding.unread of an attention: `attend` [..., T, S]; `weights`, if returned, where they are
    always 0."""
    nothing = ~attend.any(-1, keepdim=True)
    nowhere = ~attend.any(-2).unsqueeze(-1)
    unread = {"query": nothing, "key": nowhere, "value": nowhere}
    return unread, [nothing] if weights is None else [nothing, weights]


def partly_read_by_attention(attend: Tensor, inputs: Inputs) -> list[Inputs]:
    """Hiding.partly_read of an attention: a key or a value that only some queries attend to."""
    some = (attend.any(-2) & ~attend.all(-2)).nonzero()
    found = []
    for name in ("key", "value") if len(some) else ():
        x = inputs[name].clone()
        x[tuple(some[len(some) // 2].tolist())][1] = torch.nan
        found.append({**inputs, name: x})
    return found
