"""The compile-time gate of the CUDA kernels: what it reads from a disassembly, and its record."""

from pathlib import Path

from mbm_kernels.gate import compare, cuda

ROOT = Path(__file__).resolve().parents[2]
RECIPROCAL = "        MUFU.RCP R1, R2 ;\n"
SASS = f""".text._ZN3mbm8additive29additive_attention_fwd_kernelIfLi20EEEv:
        MOV R1, R2 ;
.L_x_1:
{RECIPROCAL * 8}        @P0 FADD R1, R2, R3 ;
        @!P1 BRA `(.L_x_1) ;
        EXIT ;
"""


def test_a_loop_is_counted_by_its_elements():
    ((name, (instructions, labels)),) = cuda.disassembled(SASS).items()
    assert cuda.kernel_name(name) == "additive_attention_fwd<float32, 20>"
    assert len(instructions) == 12
    assert cuda.loop_per_element(cuda.loops(instructions, labels)) == round(10 / 16, 2)


def test_the_record_has_no_spills_and_keeps_the_budgets():
    files = sorted((ROOT / "benchmarks" / "static").glob("nvcc-*/*.json"))
    assert files
    for path in files:
        kernels = compare.read_baseline(path)["kernels"]
        assert not {key for key, entry in kernels.items() if any(entry[x] for x in compare.SPILLS)}
        assert not cuda.over_budget(kernels)


def test_a_kernel_over_its_budget_is_named():
    entry = {"loop_per_element": 7.5}
    key = "additive_attention_fwd<float32, 20> | sm_90"
    assert cuda.over_budget({key: entry}) == [f"{key}: 7.5 instructions an element of at most 7.0"]


def test_a_loop_of_steps_waits_for_an_mbarrier():
    wait = "        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3 ;\n"
    sass = SASS.replace(RECIPROCAL * 8, wait).replace("additive_attention_fwd", "gru_fwd")
    ((_, (instructions, labels)),) = cuda.disassembled(sass).items()
    assert cuda.loop_of_steps(cuda.loops(instructions, labels)) == 3
    key = "gru_fwd<float16, 512, 16> | sm_90"
    entry = {"loop_per_element": 0.0, "instructions_per_step": 321}
    assert cuda.over_budget({key: entry}) == [f"{key}: 321 instructions a step of at most 320"]


def test_a_loop_of_windows_has_their_products():
    products = "        HMMA.16816.F32.BF16 R4, R8, R2, R4 ;\n" * cuda.WINDOW_PRODUCTS
    ((_, (instructions, labels)),) = cuda.disassembled(
        SASS.replace(RECIPROCAL * 8, products)
    ).items()
    assert cuda.loop_of_windows(cuda.loops(instructions, labels)) == cuda.WINDOW_PRODUCTS + 2
    key = "conv_stem_mma_fwd<float16, 1, 1> | sm_90"
    expected = [f"{key}: 451 instructions for 8 windows of at most 450"]
    assert cuda.over_budget({key: {"instructions_per_windows": 451}}) == expected


def test_a_sum_is_counted_by_its_products():
    sass = SASS.replace(RECIPROCAL * 8, "        FFMA R4, R8, R2, R4 ;\n" * 16)
    ((_, (instructions, labels)),) = cuda.disassembled(sass).items()
    assert cuda.loop_per_fma(cuda.loops(instructions, labels)) == round(18 / 16, 2)
