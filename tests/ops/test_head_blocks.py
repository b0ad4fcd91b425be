"""The native argument blocks of linear heads, their losses, contrastive_loss and concat_linear."""

import re
import struct

import pytest

from mbm_kernels._core import native
from tests.conftest import raises

pytestmark = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")


class TestBlocks:
    """The native argument blocks are filled by name and refused where they are none."""

    @pytest.fixture
    def module(self):
        return native.cpu()

    CALLS = {
        "linear_cross_entropy": ((0,) * 4, 0, 0, (0,) * 3, 1),
        "linear_topk": ((0,) * 3, (0,) * 2, 1),
        "linear_distillation_loss": ((0,) * 10, (0,) * 3, (0,) * 3, (0,) * 3, 1),
        "contrastive_loss": ((0,) * 4, 0, 0, (0,) * 4, 1),
        "concat_linear_fwd": ([], [], (0, 0, 0), 0, 1),
        "concat_linear_bwd": ([], [], ([], 0), (0, 0), [], (0, 0), 1),
    }
    FIELDS = {
        "linear_distillation_loss": "linear_distillation_problem_fields",
        "concat_linear_fwd": "concat_linear_problem_fields",
        "concat_linear_bwd": "concat_linear_problem_fields",
    }

    def fields(self, module, name):
        return getattr(module, self.FIELDS.get(name, f"{name}_problem_fields"))()

    def test_calls_take_few_arguments(self, module):
        for name in dir(module):
            if name.startswith(("linear_", "contrastive_", "concat_")):
                assert len(re.findall(r"arg\d+:", getattr(module, name).__doc__)) <= 8, name

    @pytest.mark.parametrize("name", CALLS)
    def test_a_block_of_another_size_is_refused(self, module, name):
        for block in (b"", bytes(8)):
            with raises(ValueError, f"problem: got {len(block)} bytes; expected"):
                getattr(module, name)(block, *self.CALLS[name])
        if not name.startswith("concat_"):
            with raises(ValueError, "problem: got 8000 bytes"):
                getattr(module, name)(bytes(8000), *self.CALLS[name])

    @pytest.mark.parametrize("name", CALLS)
    def test_sizes_and_addresses_are_checked(self, module, name):
        fields = self.fields(module, name)
        values = dict.fromkeys(fields, 1)
        if name.startswith("concat_"):
            values |= {"inputs": 0, "groups": 0}
        with pytest.raises(ValueError, match=r"got a null address"):
            getattr(module, name)(native.block(fields, values), *self.CALLS[name])
        for field in set(fields) & set("NHVRKCBDk"):
            wrong = native.block(fields, {**values, field: -1})
            with raises(ValueError, "problem: got", "= -1; expected"):
                getattr(module, name)(wrong, *self.CALLS[name])

    def test_a_missing_or_strange_field_is_refused(self, module):
        fields = module.contrastive_loss_problem_fields()
        with pytest.raises(KeyError):
            native.block(fields, {"B": 1, "D": 1})
        with pytest.raises(struct.error):
            native.block(fields, dict.fromkeys((*fields, "C"), 1))

    @pytest.mark.parametrize(
        ("name", "field", "value"),
        [
            ("linear_cross_entropy", "reduction", 3),
            ("linear_topk", "k", 17),
            ("linear_distillation_loss", "teacher", 3),
            ("linear_distillation_loss", "divergence", -1),
            ("contrastive_loss", "kind", 2),
        ],
    )
    def test_values_that_mean_nothing_are_refused(self, module, name, field, value):
        fields = self.fields(module, name)
        values = dict.fromkeys(fields, 1) | {"V": 100, field: value}
        block = native.block(fields, {field: values[field] for field in fields})
        with raises(ValueError, f"problem: got {field} = {value}"):
            getattr(module, name)(block, *self.CALLS[name])

    def test_the_inputs_of_concat_linear_fit_its_block(self, module):
        head = module.concat_linear_problem_fields()
        each = module.concat_linear_input_fields()
        sizes = {"R": 2, "K": 3, "C": 4, "inputs": 1, "groups": 1}
        x = {"group": 0, "rows": 2, "features": 4, "column": 0, "stride": 4}

        def run(sizes, x, inputs=(64,), indices=(0,), weight=0):
            block = native.block(head, sizes) + native.block(each, x)
            module.concat_linear_fwd(block, list(inputs), list(indices), (0, weight, 0), 0, 1)

        for wrong, message in (
            (({**sizes, "inputs": 2}, x, (64, 64)), "bytes of inputs"),
            ((sizes, x, ()), "addresses of inputs"),
            ((sizes, x, (64,), ()), "addresses of indices"),
            ((sizes, {**x, "column": 1}), "column"),
            ((sizes, {**x, "rows": 1}), "rows without an index"),
            ((sizes, {**x, "group": 1}), "group"),
            ((sizes, x), "packed: got a null address"),
            ((sizes, x, (64,), (64,), 64), "an index beside an unpacked weight"),
        ):
            with pytest.raises(ValueError, match=message):
                run(*wrong)
