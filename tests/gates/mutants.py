"""Plants bugs in the kernels, one at a time, in a copy of the tree; the tests must see each.

    make mutants        or: python tests/mutants.py [--only NAME]

A mutant is a file, a text that occurs once in it, what replaces it, and the tests expected to
fail. Exit status 0 when every one is caught, 1 otherwise; 2 when a mutant's text is not found,
which means that the kernel changed and the mutant must follow.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("mbm_kernels", "csrc", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Mutant:
    name: str
    path: str
    old: str
    new: str
    tests: str


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
        "tests/test_gru.py",
    ),
    Mutant(
        "wrong-mask-stride",
        ATTENTION,
        "const bool attend = m[s * in_.mask_stride_s] != 0;",
        "const bool attend = m[s] != 0;",
        "tests/test_additive_attention.py",
    ),
    Mutant(
        "missing-mask",
        ATTENTION,
        "padded[s] = attend ? row[s] : kMasked;",
        "padded[s] = row[s];",
        "tests/test_additive_attention.py",
    ),
    Mutant(
        "dropped-bias",
        GRU_FORWARD,
        "const vf hn = load(c + 2 * kPanel + j) + load(w_.bias_hn + u);",
        "const vf hn = load(c + 2 * kPanel + j);",
        "tests/test_gru.py",
    ),
    Mutant(
        "stale-weight-cache",
        "mbm_kernels/_core/packing.py",
        "state += (tensor.data_ptr(), tensor._version)",
        "state += (tensor.data_ptr(), 0)",
        "tests/test_gru.py tests/test_nn_gru.py",
    ),
    Mutant(
        "padding-left-uninitialised",
        GRU_FORWARD,
        "if (thread % grid.units == 0) clear_padding(share);",
        "",
        "tests/test_gru.py",
    ),
    Mutant(
        "reverse-ignored-in-backward",
        GRU_BACKWARD,
        "const int64_t t = seq_.reverse ? s : seq_.T - 1 - s;",
        "const int64_t t = seq_.T - 1 - s;",
        "tests/test_gru.py",
    ),
    Mutant(
        "accurate-small-form-dropped",
        ATTENTION_BACKWARD,
        "if (bound <= kSmallLimit) return Form::kSmall;",
        "",
        "tests/test_additive_attention.py",
    ),
    Mutant(
        "second-slice-of-k-overwrites",
        "csrc/common/gemm.h",
        "const bool add = g.accumulate || k > 0, last = k + depth == g.K;",
        "const bool add = g.accumulate, last = k + depth == g.K;",
        "tests/test_gru.py",
    ),
    Mutant(
        "saturated-branch-dropped",
        ATTENTION,
        "if (!v_.factorable || !in_range) {",
        "if (false) {",
        "tests/test_additive_attention.py",
    ),
    Mutant(
        "gradient-of-v-misses-a-batch-element",
        ATTENTION_BACKWARD,
        "for (int64_t b = 0; b < in.B; ++b) total += grad_v_parts[b * in.D + d];",
        "for (int64_t b = 1; b < in.B; ++b) total += grad_v_parts[b * in.D + d];",
        "tests/test_additive_attention.py",
    ),
    Mutant(
        "lengths-ignored",
        "csrc/additive_attention/tanh_forms.h",
        "if (in.key_lengths == nullptr) return in.S;",
        "return in.S;",
        "tests/test_additive_attention.py",
    ),
    Mutant(
        "second-block-of-queries-overwrites-grad-key",
        CROSS_BACKWARD,
        "args_.grad_key.stride_r, t0 > 0);",
        "args_.grad_key.stride_r, false);",
        "tests/test_cross_attention_native.py",
    ),
    Mutant(
        "repeated-product-added-to-the-wrong-row",
        "csrc/concat_linear/concat_linear_cpu.cpp",
        "sum += load_part(r.product + r.index[m] * args.K + n, n1 - n);",
        "sum += load_part(r.product + r.index[0] * args.K + n, n1 - n);",
        "tests/test_concat_linear.py",
    ),
)


def copy_tree(folder: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
        else:
            shutil.copy(source, folder / name)


class Runner:
    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "MBM_CUDA": "0", "PYTHONPATH": str(folder)}

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )

    def build(self) -> None:
        done = self.command("setup.py", "-q", "build_ext", "--inplace")
        if done.returncode != 0:
            raise SystemExit(f"mutants: the copy does not compile:\n{done.stdout}{done.stderr}")

    def tests(self, names: str) -> tuple[bool, str]:
        """Whether they pass, and the first that failed."""
        done = self.command(
            "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *names.split()
        )
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        if done.returncode not in (0, 1):
            raise SystemExit(f"mutants: pytest did not run:\n{done.stdout}{done.stderr}")
        return done.returncode == 0, failed[0].split(" - ")[0].split("::")[-1] if failed else ""


def plant(mutant: Mutant, folder: Path) -> str:
    path = folder / mutant.path
    text = path.read_text()
    if text.count(mutant.old) != 1:
        print(f"{mutant.name}: its text occurs {text.count(mutant.old)} times in {mutant.path}")
        raise SystemExit(2)
    path.write_text(text.replace(mutant.old, mutant.new))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="name of one mutant")
    only = parser.parse_args().only
    chosen = [m for m in MUTANTS if only in (None, m.name)]
    if not chosen:
        parser.error(f"no mutant {only!r}; there are {', '.join(m.name for m in MUTANTS)}")
    started, survivors = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        runner = Runner(folder)
        runner.build()
        for mutant in chosen:
            original = plant(mutant, folder)
            runner.build()
            passed, first = runner.tests(mutant.tests)
            (folder / mutant.path).write_text(original)
            survivors += [mutant.name] if passed else []
            print(f"{'SURVIVED' if passed else 'caught':9}{mutant.name:40}{first}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught in "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
