"""Plants bugs in the kernels, one at a time, in copies of the tree; the tests must see each.

    make mutants        or: python -m tests.gates.mutants [--only NAME]

Each copy holds one ISA, the widest that runs here, and is compiled anew where the bug lies. The
tests that a mutant names run first; only a mutant that survives them meets all tests of its
operation. Exit status 0 when every one is caught, 1 otherwise; 2 when a mutant's text is not found,
which means that the kernel changed and the mutant must follow.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mbm_kernels._core import native
from tests.gates.planting import ROOT, Mutant, build, copy_tree, planted

COPIES = 2  # as many mutants at a time
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
COMMON_TESTS = "tests/ops/test_gru.py tests/core/test_csrc.py"

GRU_FORWARD = "csrc/gru/gru_cpu_forward.cpp"
GRU_BACKWARD = "csrc/gru/gru_cpu_backward.cpp"
ATTENTION = "csrc/additive_attention/additive_attention_cpu.cpp"
ATTENTION_BACKWARD = "csrc/additive_attention/additive_attention_backward_cpu.cpp"
CROSS_BACKWARD = "csrc/cross_attention/cross_attention_backward_cpu.cpp"

MUTANTS = (
    Mutant(
        "off-by-one-tail",
        "csrc/common/simd.h",
        "    store_n(p, v, static_cast<int>(left));",
        "    store_n(p, v, static_cast<int>(left) - 1);",
        "tests/ops/test_drawn.py -k gru",
    ),
    Mutant(
        "wrong-mask-stride",
        ATTENTION,
        "const bool attend = m[s * in_.mask_stride_s] != 0;",
        "const bool attend = m[s] != 0;",
        "tests/ops/test_drawn.py -k additive_attention",
    ),
    Mutant(
        "missing-mask",
        ATTENTION,
        "padded[s] = attend ? row[s] : kMasked;",
        "padded[s] = row[s];",
        "tests/ops/test_drawn.py -k additive_attention",
    ),
    Mutant(
        "dropped-bias",
        GRU_FORWARD,
        "const vf hn = load(c + 2 * kPanel + j) + load(w_.bias_hn + u);",
        "const vf hn = load(c + 2 * kPanel + j);",
        "tests/ops/test_drawn.py -k gru",
    ),
    Mutant(
        "stale-weight-cache",
        "mbm_kernels/_core/packing.py",
        "return last if hashes == last.hashes else replace(last, hashes=hashes)",
        "return last",
        "tests/ops/test_gru.py -k changed_in_place",
    ),
    Mutant(
        "padding-left-uninitialised",
        GRU_FORWARD,
        "if (thread % grid.units == 0) clear_padding(share);",
        "",
        "tests/ops/test_drawn.py -k gru",
    ),
    Mutant(
        "reverse-ignored-in-backward",
        GRU_BACKWARD,
        "const int64_t t = seq_.reverse ? s : seq_.T - 1 - s;",
        "const int64_t t = seq_.T - 1 - s;",
        "tests/ops/test_drawn.py -k gru",
    ),
    Mutant(
        "accurate-small-form-dropped",
        ATTENTION_BACKWARD,
        "if (bound <= kSmallLimit) return Form::kSmall;",
        "",
        "tests/ops/test_drawn.py -k additive_attention",
    ),
    Mutant(
        "second-slice-of-k-overwrites",
        "csrc/common/gemm.h",
        "const bool add = g.accumulate || k > 0, last = k + depth == g.K;",
        "const bool add = g.accumulate, last = k + depth == g.K;",
        "tests/ops/test_drawn.py -k gru",
    ),
    Mutant(
        "saturated-branch-dropped",
        ATTENTION,
        "if (v_.factorable && query_magnitude + key_magnitude <= kRatioLimit) {",
        "if (true) {",
        "tests/ops/test_drawn.py -k additive_attention",
    ),
    Mutant(
        "gradient-of-v-misses-a-batch-element",
        ATTENTION_BACKWARD,
        "for (int64_t b = 0; b < in.B; ++b) total += grad_v_parts[b * in.D + d];",
        "for (int64_t b = 1; b < in.B; ++b) total += grad_v_parts[b * in.D + d];",
        "tests/ops/test_drawn.py -k additive_attention",
    ),
    Mutant(
        "second-direction-runs-forwards",
        "csrc/gru/gru_problem.h",
        "if (d == 1) sequence.reverse = !sequence.reverse;",
        "",
        "tests/ops/test_gru_bidirectional.py -k forward",
    ),
    Mutant(
        "higher-class-first-of-a-tie",
        "csrc/linear_topk/linear_topk_cpu.cpp",
        "return a > b || (a != a && b == b);",
        "return a >= b || (a != a && b == b);",
        "tests/ops/test_linear_topk.py",
    ),
    Mutant(
        "lengths-ignored",
        "csrc/additive_attention/tanh_forms.h",
        "if (in.key_lengths == nullptr) return in.S;",
        "return in.S;",
        "tests/ops/test_drawn.py -k additive_attention",
    ),
    Mutant(
        "magnitude-of-a-kept-key-forgotten",
        ATTENTION,
        "out + packed.at(tile), out + packed.magnitudes_at(tile));",
        "out + packed.at(tile), out + packed.magnitudes_at(tile)),\n"
        "          std::fill_n(out + packed.magnitudes_at(tile), kKeys, 0.0f);",
        "tests/ops/test_additive_attention_keys.py -k form",
    ),
    Mutant(
        "keys-of-the-tile-past-the-length-count",
        ATTENTION,
        "for (int j = 0; j < keys; ++j)\n          key_magnitude",
        "for (int j = 0; j < kKeys; ++j)\n          key_magnitude",
        "tests/ops/test_additive_attention_keys.py -k influence",
    ),
    Mutant(
        "keys-share-the-memory-of-the-key",
        "mbm_kernels/ops/additive_attention/keys.py",
        "key.to(torch.float32, copy=True, memory_format=torch.contiguous_format)",
        "key.to(torch.float32)",
        "tests/ops/test_additive_attention_keys.py -k Snapshot",
    ),
    Mutant(
        "exponentials-of-another-isa",
        "mbm_kernels/ops/additive_attention/backend_cpu.py",
        "if prepared is not None and prepared.isa == native.isa() else None",
        "if prepared is not None else None",
        "tests/ops/test_additive_attention_keys.py -k isa",
    ),
    Mutant(
        "sign-left-out-of-the-gradient-of-v",
        ATTENTION_BACKWARD,
        "grad_v[i] = block.sign[i] * (total",
        "grad_v[i] = (total",
        "tests/ops/test_additive_attention.py -k backward",
    ),
    Mutant(
        "second-block-of-queries-overwrites-grad-key",
        CROSS_BACKWARD,
        "args_.grad_key.stride_r, t0 > 0);",
        "args_.grad_key.stride_r, false);",
        "tests/ops/test_cross_attention_native.py",
    ),
    Mutant(
        "repeated-product-added-to-the-wrong-row",
        "csrc/concat_linear/concat_linear_cpu.cpp",
        "sum += load_part(r.product + r.index[m] * args.K + n, n1 - n);",
        "sum += load_part(r.product + r.index[0] * args.K + n, n1 - n);",
        "tests/ops/test_drawn.py -k concat_linear",
    ),
    Mutant(
        "bias-gradient-misses-a-part",
        "csrc/conv_bias_act/conv_backward_cpu.cpp",
        "for (int64_t i = 0; i < count; ++i) total += parts[i * padded + k];",
        "for (int64_t i = 1; i < count; ++i) total += parts[i * padded + k];",
        "tests/ops/test_drawn.py -k conv_bias_act",
    ),
    Mutant(
        "dilation-dropped-from-grad-x",
        "csrc/conv_bias_act/conv_backward_cpu.cpp",
        "(s.S - 1) * s.dilation_x - s.left + columns.first,",
        "(s.S - 1) - s.left + columns.first,",
        "tests/ops/test_drawn.py -k conv_bias_act",
    ),
    Mutant(
        "gradient-past-the-length-left-uninitialised",
        "csrc/cross_attention/cross_attention_backward_cpu.cpp",
        "clear(args_.grad_key, b, n, count, in_.D);",
        "",
        "tests/ops/test_drawn.py -k cross_attention",
    ),
    Mutant(
        "hidden-value-read",
        "csrc/cross_attention/head_weights.h",
        "if (masked() && any_special(rows, width, out, out_stride))",
        "if (false)",
        "tests/ops/test_cross_attention.py -k partly_hidden",
    ),
    Mutant(
        "mean-over-one-head-too-few",
        "csrc/cross_attention/cross_attention_cpu.cpp",
        "const vf share = set1(1.0f / static_cast<float>(N));",
        "const vf share = set1(1.0f / static_cast<float>(N > 1 ? N - 1 : N));",
        "tests/ops/test_drawn.py -k cross_attention",
    ),
    Mutant(
        "target-not-subtracted",
        "csrc/linear_cross_entropy/linear_cross_entropy_cpu.cpp",
        "if (is_class(v, v0, v0 + classes)) z(v - v0, r) = target_gradients()[r];",
        "",
        "tests/ops/test_drawn.py -k linear_cross_entropy",
    ),
    Mutant(
        "smoothing-over-one-class-too-few",
        "csrc/linear_cross_entropy/linear_cross_entropy_cpu.cpp",
        "on_all()[r] = static_cast<float>(smoothed / static_cast<double>(a_.V));",
        "on_all()[r] = static_cast<float>(smoothed / static_cast<double>(a_.V - 1));",
        "tests/ops/test_drawn.py -k linear_cross_entropy",
    ),
    Mutant(
        "slope-of-a-capped-logit",
        "csrc/common/tanh_slope.h",
        "return {copysign(-em / sum, x), slope_of_tail((e + e) / sum)};",
        "return {copysign(-em / sum, x), set1(1.0f) - (em / sum) * (em / sum)};",
        "tests/ops/test_linear_cross_entropy.py -k softcap",
    ),
    Mutant(
        "ids-are-addresses",
        "csrc/linear_distillation_loss/linear_distillation_loss_cpu.cpp",
        "if (!is_class(a_.topk_ids[n * a_.k + j], 0, a_.V)) return false;",
        "",
        "tests/ops/test_indices.py",
    ),
    Mutant(
        "padding-counts-as-images",
        "csrc/contrastive_loss/contrastive_loss_cpu.cpp",
        "const vf e1 = keep_lanes(exp_or_zero((load(at + kLanes) - top) * s), live1);",
        "const vf e1 = exp_or_zero((load(at + kLanes) - top) * s);",
        "tests/ops/test_drawn.py -k contrastive_loss",
    ),
    Mutant(
        "largest-logit-of-a-later-chunk-forgotten",
        "csrc/contrastive_loss/contrastive_loss_cpu.cpp",
        "sum *= std::exp((top - here) * s_);",
        "",
        "tests/ops/test_contrastive_loss_native.py",
    ),
)


def more_tests(mutant: Mutant) -> str:
    """All tests of the operation in whose folder the bug lies."""
    op = mutant.path.split("/")[1]
    names = sorted(p.name for p in (ROOT / "tests" / "ops").glob(f"test_{op}*.py"))
    return " ".join(f"tests/ops/{name}" for name in names) or COMMON_TESTS


def run_tests(folder: Path, arguments: str) -> tuple[bool, str]:
    """Whether they pass, and the first that failed."""
    done = subprocess.run(
        [*PYTEST, *arguments.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"mutants: pytest did not run:\n{done.stdout}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 0, failed[0].split(" - ")[0].split("::")[-1] if failed else ""


def try_one(mutant: Mutant, copies: "queue.Queue[Path]", isa: str) -> bool:
    """Whether the tests see it."""
    folder = copies.get()
    try:
        with planted(mutant, folder):
            build(folder, MBM_BUILD_ISA=isa)
            passed, first = run_tests(folder, mutant.caught_by)
            if passed:
                passed, first = run_tests(folder, more_tests(mutant))
    finally:
        copies.put(folder)
    print(f"{'SURVIVED' if passed else 'caught':9}{mutant.name:48}{first}", flush=True)
    return not passed


def check_sound(folder: Path, chosen: list[Mutant]) -> None:
    """Ends the program where the tests fail without any bug planted."""
    for arguments in sorted({mutant.caught_by for mutant in chosen}):
        passed, first = run_tests(folder, arguments)
        if not passed:
            raise SystemExit(f"mutants: {arguments} fails without a bug: {first}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="name of one mutant")
    only = parser.parse_args().only
    chosen = [m for m in MUTANTS if only in (None, m.name)]
    if not chosen:
        parser.error(f"no mutant {only!r}; there are {', '.join(m.name for m in MUTANTS)}")
    started, isa = time.monotonic(), native.cpu().best_isa()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(COPIES) as pool:
        first = Path(name) / "0"
        copy_tree(first)
        build(first, MBM_BUILD_ISA=isa)
        copies: queue.Queue[Path] = queue.Queue()
        copies.put(first)
        for i in range(1, COPIES):
            copies.put(Path(shutil.copytree(first, Path(name) / str(i))))
        check_sound(first, chosen)
        print(f"compiled and sound after {time.monotonic() - started:.0f} s", flush=True)
        caught = list(pool.map(lambda mutant: try_one(mutant, copies, isa), chosen))
    print(f"{sum(caught)} of {len(chosen)} caught in {time.monotonic() - started:.0f} s")
    sys.exit(0 if all(caught) else 1)


if __name__ == "__main__":
    main()
