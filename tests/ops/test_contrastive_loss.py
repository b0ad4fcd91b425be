"""contrastive_loss: the common suite, then its own properties."""

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels.ops.contrastive_loss import reference
from mbm_kernels.testing import Case, OpSuite
from mbm_kernels.testing.suite import map_floating, with_leaves
from tests.conftest import near, precise, raises


def sizes(b, d):
    return {"B": b, "D": d}


SIGLIP = {"kind": "siglip", "bias": True}


class TestContrastiveLoss(OpSuite):
    op = "contrastive_loss"
    function = staticmethod(mbm_kernels.contrastive_loss)
    reference = staticmethod(reference.contrastive_loss)
    diff = ("image", "text", "scale", "bias")
    autocast_output = torch.float32
    cases = [
        Case("primes below one vector", sizes(5, 7)),
        Case("several tiles in each dimension", sizes(37, 131)),
        Case("siglip, primes below one vector", sizes(5, 7), SIGLIP),
        Case("siglip, several tiles in each dimension", sizes(37, 131), SIGLIP),
        Case("siglip without bias", sizes(8, 16), {"kind": "siglip"}),
        Case("infonce with a bias", sizes(8, 16), {"bias": True}),
        Case("normalised, sharp", sizes(16, 32), {"normalised": True, "scale": 14.0}),
        Case(
            "siglip as at its start", sizes(16, 32), {**SIGLIP, "normalised": True, "scale": 10.0}
        ),
        Case("tiny magnitudes", sizes(8, 16), scale=1e-3),
        Case("large magnitudes saturate", sizes(8, 16), scale=3),
        Case("siglip, large magnitudes saturate", sizes(8, 16), SIGLIP, scale=3),
    ]
    edge_cases = [
        Case("a single pair", sizes(1, 1)),
        Case("siglip, a single pair", sizes(1, 1), {"kind": "siglip"}, scale=0.5),
        Case("no pairs", sizes(0, 4)),
        Case("siglip, no pairs", sizes(0, 4), SIGLIP),
        Case("no features", sizes(3, 0)),
        Case("siglip, no features", sizes(3, 0), SIGLIP),
    ]

    def make(self, case, generator):
        b, d = (case.sizes[letter] for letter in "BD")

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        image, text = randn(b, d), randn(b, d)
        if case.options.get("normalised"):
            image, text = F.normalize(image), F.normalize(text)
        scale = torch.tensor(case.options.get("scale", 1.3), dtype=torch.float64)
        return {
            "image": image,
            "text": text,
            "scale": scale,
            "bias": torch.tensor(-1.7, dtype=torch.float64) if case.options.get("bias") else None,
            "kind": case.options.get("kind", "infonce"),
        }

    def test_autocast(self, backend):
        for case in (self.cases[0], self.cases[2]):
            inputs, leaves = with_leaves(self.inputs(case, torch.float32), self.diff)
            with torch.autocast("cpu", torch.bfloat16):
                (loss,) = self.run(inputs, backend)
            low = {name: inputs[name].detach().bfloat16() for name in ("image", "text")}
            (expected,) = self.run({**inputs, **low}, backend)
            assert loss.dtype == torch.float32
            assert expected.dtype == torch.bfloat16
            assert torch.equal(loss.bfloat16(), expected)
            # Only stock's products of image and text are rounded to bfloat16.
            rounded = low if backend == "torch" else map_floating(low, torch.Tensor.double)
            x = (rounded["image"] @ rounded["text"].T).double()
            products = {"image": x, "text": torch.eye(5, dtype=torch.float64)}
            exact = self.define({**inputs, **products})[0].float()
            torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-6)
            for grad in torch.autograd.grad(loss, leaves.values()):
                assert grad.dtype == torch.float32
                assert torch.isfinite(grad).all()

    def test_infonce_equals_cross_entropies(self, backend):
        inputs = self.inputs(self.cases[1], precise(backend))
        logits = inputs["scale"] * inputs["image"] @ inputs["text"].T
        pairs = torch.arange(37)
        expected = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        torch.testing.assert_close(self.run(inputs, backend)[0], expected)

    def test_siglip_equals_binary_cross_entropy(self, backend):
        inputs = self.inputs(self.cases[3], precise(backend))
        logits = inputs["scale"] * inputs["image"] @ inputs["text"].T + inputs["bias"]
        labels = torch.eye(37, dtype=logits.dtype)
        expected = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / 37
        torch.testing.assert_close(self.run(inputs, backend)[0], expected)

    @pytest.mark.parametrize("kind", ["infonce", "siglip"])
    def test_gradient_is_its_closed_form(self, backend, kind):
        inputs = self.inputs(self.cases[3], precise(backend)) | {"kind": kind}
        image, text, scale, bias = (inputs[name].double() for name in self.diff)
        similarities = image @ text.T
        logits = scale * similarities + bias
        eye = torch.eye(37, dtype=torch.float64)
        if kind == "infonce":
            dlogits = (logits.softmax(0) + logits.softmax(1) - 2 * eye) / (2 * 37)
        else:
            dlogits = (logits.sigmoid() - eye) / 37
        found = self.gradients(lambda i: self.run(i, backend), inputs, [torch.ones(())])
        near(found["image"], scale * dlogits @ text)
        near(found["text"], scale * dlogits.T @ image)
        near(found["scale"], (dlogits * similarities).sum())
        near(found["bias"], dlogits.sum())

    @pytest.mark.parametrize("kind", ["infonce", "siglip"])
    def test_numbers_equal_tensors(self, backend, kind, dtype):
        inputs = self.inputs(self.cases[2], dtype) | {"kind": kind}
        # 2 and -1.5 are exact in each dtype.
        tensors = {"scale": torch.tensor([2.0]), "bias": torch.tensor(-1.5, dtype=torch.float64)}
        (expected,) = self.run({**inputs, **tensors}, backend)
        (actual,) = self.run({**inputs, "scale": 2, "bias": -1.5}, backend)
        assert torch.equal(actual, expected)
        assert actual.dtype == dtype

    def test_gradients_have_the_shapes_and_dtypes_of_scale_and_bias(self, backend):
        inputs = self.inputs(self.cases[2], torch.float32)
        scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(-1.5, dtype=torch.bfloat16, requires_grad=True)
        self.run({**inputs, "scale": scale, "bias": bias}, backend)[0].backward()
        assert (scale.grad.shape, scale.grad.dtype) == ((1,), torch.float64)
        assert (bias.grad.shape, bias.grad.dtype) == ((), torch.bfloat16)
        assert scale.grad.abs() > 0
        assert bias.grad.abs() > 0

    @pytest.mark.parametrize("kind", ["infonce", "siglip"])
    def test_order_of_pairs_does_not_matter(self, backend, kind):
        inputs = self.inputs(self.cases[1], precise(backend)) | {"kind": kind}
        order = torch.randperm(37)
        shuffled = {**inputs, "image": inputs["image"][order], "text": inputs["text"][order]}
        swapped = {**inputs, "image": inputs["text"], "text": inputs["image"]}
        expected = self.run(inputs, backend)
        torch.testing.assert_close(self.run(shuffled, backend), expected)
        torch.testing.assert_close(self.run(swapped, backend), expected)

    def test_infonce_does_not_depend_on_the_bias(self, backend):
        inputs = self.inputs(self.cases[5], precise(backend))
        expected = self.run({**inputs, "bias": None}, backend)
        torch.testing.assert_close(self.run(inputs, backend), expected)
        inputs["bias"].requires_grad_()
        self.run(inputs, backend)[0].backward()
        assert inputs["bias"].grad == 0

    @pytest.mark.parametrize("kind", ["infonce", "siglip"])
    def test_nothing_is_normalised_and_scale_has_no_exponential(self, backend, kind):
        inputs = self.inputs(self.cases[1], precise(backend)) | {"kind": kind}
        folded = {**inputs, "image": inputs["image"] * inputs["scale"], "scale": 1.0}
        torch.testing.assert_close(self.run(inputs, backend), self.run(folded, backend))

    def test_saturated_logits_are_finite(self, backend):
        image = 100 * torch.eye(3)
        for kind, sign in (("infonce", 1), ("siglip", 1), ("infonce", -1), ("siglip", -1)):
            given = {"image": image, "text": sign * image, "scale": 1.0, "kind": kind}
            (loss,) = self.run(given, backend)
            worst = 1e4 if sign < 0 else 0
            torch.testing.assert_close(loss, torch.tensor(float(worst)), rtol=1e-3, atol=2)
            given["image"] = image.clone().requires_grad_()
            (grad,) = torch.autograd.grad(self.run(given, backend)[0], given["image"])
            assert torch.isfinite(grad).all()

    def test_confident_siglip_keeps_its_digits(self, backend):
        image = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
        given = {"image": image, "text": image, "scale": 1.0, "bias": -12.5, "kind": "siglip"}
        (loss,) = self.run(given, backend)
        expected = 2 * torch.tensor(-12.5, dtype=torch.float64).exp().log1p()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)

    def test_inputs_are_left_alone(self, backend):
        for case in (self.cases[0], self.cases[2], self.cases[4]):
            inputs = self.inputs(case, torch.float32)
            before = map_floating(inputs, torch.Tensor.clone)
            self.run(inputs, backend)
            for name in ("image", "text", "scale"):
                assert torch.equal(inputs[name], before[name])

    def test_vmap(self, backend):
        images, texts = torch.randn(3, 5, 7), torch.randn(3, 5, 7)

        def one(image, text):
            return mbm_kernels.contrastive_loss(image, text, 2.0, kind="siglip", backend=backend)

        expected = torch.stack([one(i, t) for i, t in zip(images, texts, strict=True)])
        torch.testing.assert_close(torch.vmap(one)(images, texts), expected)

    def test_bad_input(self):
        good = self.inputs(self.cases[2], torch.float32)
        call = mbm_kernels.contrastive_loss

        def bad(**changes):
            return {**good, **changes}

        with raises(TypeError, "image", "torch.Tensor"):
            call(**bad(image=[[1.0]]))
        with raises(ValueError, "image", "2 dimensions"):
            call(**bad(image=torch.randn(5)))
        with raises(ValueError, "text", r"\[B, D\] = \[5, 7\]"):
            call(**bad(text=torch.randn(6, 7)))
        with raises(ValueError, "text", r"\[B, D\] = \[5, 7\]"):
            call(**bad(text=torch.randn(5, 8)))
        with raises(TypeError, "text", "float64", "float32 as image"):
            call(**bad(text=good["text"].double()))
        with raises(TypeError, "image", "int64", "float64, float32"):
            call(**bad(image=torch.ones(5, 7, dtype=torch.int64)))
        with raises(ValueError, "text", "meta", "cpu as image"):
            call(**bad(text=good["text"].to("meta")))
        for name in ("scale", "bias"):
            with raises(ValueError, f"{name}: got shape \\[2\\]", "one element"):
                call(**bad(**{name: torch.ones(2)}))
            with raises(ValueError, name, r"shape \[1, 1\]"):
                call(**bad(**{name: torch.ones(1, 1)}))
            with raises(TypeError, name, "int64", "float32"):
                call(**bad(**{name: torch.tensor(1)}))
            with raises(TypeError, name, "str 'big'", "a number or a tensor"):
                call(**bad(**{name: "big"}))
            with raises(ValueError, name, "got nan", "a finite number"):
                call(**bad(**{name: float("nan")}))
            with raises(ValueError, name, "meta", "cpu as image"):
                call(**bad(**{name: torch.ones((), device="meta")}))
        with raises(TypeError, "scale", "NoneType None"):
            call(**bad(scale=None))
        with raises(ValueError, "kind", "'clip'", "'infonce', 'siglip'"):
            call(**bad(kind="clip"))
