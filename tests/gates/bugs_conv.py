"""Bugs for `make mutants` in the kernels of conv_bias_act."""

from tests.gates.planting import Mutant

FOLDER = "csrc/conv_bias_act"
STRIPS = f"{FOLDER}/conv_group_strips_cpu.cpp"
ROWS = f"{FOLDER}/conv_group_rows_cpu.cpp"
RUN = f"{FOLDER}/conv_run.h"
PIXELS = f"{FOLDER}/conv_pixels_cpu.cpp"
PLANES = f"{FOLDER}/conv_planes_cpu.cpp"
TILE = f"{FOLDER}/conv_tile.h"
FEW = f"{FOLDER}/conv_few_cpu.cpp"
GATE = f"{FOLDER}/conv_gate_cpu.cpp"
GATING = "tests/optimize/test_gating.py"
NATIVE = "tests/ops/test_conv_native.py"
DRAWN = "tests/ops/test_drawn.py -k conv_bias_act"

BUGS = (
    Mutant(
        "slices-of-a-long-sum-are-not-put-aside",
        TILE,
        "if (left_ == 0) {",
        "if (false) {",
        f"{NATIVE} -k long_sums",
    ),
    Mutant(
        "slices-of-a-direct-sum-replace-one-another",
        f"{FOLDER}/conv_direct_cpu.cpp",
        "slice.weights > 0);",
        "false);",
        f"{NATIVE} -k definition",
    ),
    Mutant(
        "activation-of-few-channels-misses-a-second-row",
        FEW,
        "finish_ && y < std::min(s_.conv_y, 2 * line + 2); ++y)",
        "finish_ && y < std::min(s_.conv_y, 2 * line + 1); ++y)",
        f"{NATIVE} -k definition",
    ),
    Mutant(
        "what-few-channels-save-lies-in-the-first-row",
        FEW,
        "Run run = channels_run(args_, b, k, n, y + r, 0, s_.conv_x);",
        "Run run = channels_run(args_, b, k, n, y, 0, s_.conv_x);",
        f"{NATIVE} -k definition",
    ),
    Mutant(
        "interleaved-rows-begin-with-the-wrong-one",
        f"{FOLDER}/conv_strip.h",
        "return row == C ? kLanes + at : (C == 1 ? at : l);",
        "return row == C ? at : (C == 1 ? at : l);",
        f"{NATIVE} -k definition",
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
        "strips-channels-written-past-the-last",
        STRIPS,
        "store_channels(t.y + i * t.row, y, t.width);",
        "store(t.y + i * t.row, y);",
        DRAWN,
    ),
    Mutant(
        "column-taps-of-a-stride-share-a-remainder",
        STRIPS,
        "return (r % s.stride_y * s.stride_x + t % s.stride_x) * phase",
        "return (r % s.stride_y * s.stride_x) * phase",
        DRAWN,
    ),
    Mutant(
        "weights-of-the-first-group-of-strips",
        STRIPS,
        "(g * panels_of(outputs_) + k / kPanel) *",
        "(k / kPanel) *",
        DRAWN,
    ),
    Mutant(
        "what-a-later-strip-saves-lies-in-the-first",
        STRIPS,
        "const int64_t saved = (b * s_.conv_y + y0) *",
        "const int64_t saved = (b * s_.conv_y) *",
        DRAWN,
    ),
    Mutant(
        "last-vector-of-a-strips-row-begins-after-the-others",
        STRIPS,
        "std::max<int64_t>(0, s_.conv_x - kLanes));",
        "std::max<int64_t>(0, s_.conv_x - kLanes + 1));",
        DRAWN,
    ),
    Mutant(
        "dilation-dropped-where-a-row-of-a-group-ends",
        ROWS,
        "t.left + s * t.dilation + i * t.stride;",
        "t.left + s + i * t.stride;",
        DRAWN,
    ),
    Mutant(
        "weights-of-the-first-group-of-rows",
        ROWS,
        "args_.packed + (g * panels_ + panel) *",
        "args_.packed + panel *",
        DRAWN,
    ),
    Mutant(
        "kernels-rows-above-the-picture",
        ROWS,
        "t.r0 = top < 0 ? (-top + s_.dilation_y - 1) / s_.dilation_y : 0;",
        "t.r0 = top < 0 ? (-top + s_.dilation_y) / s_.dilation_y : 0;",
        DRAWN,
    ),
    Mutant(
        "activation-before-the-residual",
        RUN,
        "if (run.residual) z = z + load_channels(run.residual + i, n);",
        "if (run.residual) z = activate(activation, z) + load_channels(run.residual + i, n);",
        DRAWN,
    ),
    Mutant(
        "slope-of-what-was-activated",
        RUN,
        "if (run.z) store_channels(run.z + i, z, n);",
        "if (run.z) store_channels(run.z + i, a, n);",
        DRAWN,
    ),
    Mutant(
        "residual-of-pixels-apart-read-as-side-by-side",
        RUN,
        "if (n == s.K && args.y.x == n && (!residual.data || residual.x == n)) {",
        "if (n == s.K && args.y.x == n) {",
        DRAWN,
    ),
    Mutant(
        "residual-left-out-where-nothing-is-saved",
        RUN,
        "return plain(a) && !args.residual.data && !args.places ?",
        "return plain(a) && !args.places ?",
        DRAWN,
    ),
    Mutant(
        "last-column-of-the-picture-read-as-padding",
        PIXELS,
        "std::clamp(i * run + (s_.X - x) * inputs_, first, end)",
        "std::clamp(i * run + (s_.X - 1 - x) * inputs_, first, end)",
        DRAWN,
    ),
    Mutant(
        "images-apart-taken-for-side-by-side",
        PIXELS,
        "(B == 1 || map.b == Y * X * map.x)",
        "(B == 1 || map.b >= Y * X * map.x)",
        DRAWN,
    ),
    Mutant(
        "offset-of-a-group-of-pixels",
        PIXELS,
        "m0 * args_.x.x + g * inputs_ + k0;",
        "m0 * args_.x.x + k0;",
        DRAWN,
    ),
    Mutant(
        "residual-offset-of-the-result",
        PIXELS,
        "residual_offsets[m - m0] = args_.residual.at(at.b, 0, at.y, at.x) - args_.residual.data;",
        "residual_offsets[m - m0] = offsets[m - m0];",
        DRAWN,
    ),
    Mutant(
        "rows-with-gaps-read-as-one-plane",
        PLANES,
        "s_.conv_x == s_.X && args.x.y == s_.X;",
        "s_.conv_x == s_.X;",
        DRAWN,
    ),
    Mutant(
        "taps-of-a-weight-with-its-channels-last",
        PLANES,
        "const bool by_tap = w_.c_step == 1;",
        "const bool by_tap = false;",
        DRAWN,
    ),
    Mutant(
        "first-pixel-past-the-stride",
        PLANES,
        "copy_even(from, valid, s_.X - x0 - 2 * first, to + first);",
        "copy_even(from + 1, valid, s_.X - x0 - 2 * first - 1, to + first);",
        DRAWN,
    ),
    Mutant(
        "bias-of-the-first-channel-of-a-tile",
        TILE,
        "(bias_by_row ? set1(t.bias[i]) : across)",
        "(bias_by_row ? set1(t.bias[0]) : across)",
        DRAWN,
    ),
    Mutant(
        "mean-of-a-plane-without-its-last-pixels",
        GATE,
        "return i < n ? total + load_n(x + i, static_cast<int>(n - i)) : total;",
        "return total;",
        GATING,
    ),
    Mutant(
        "slices-of-few-rows-replace-one-another",
        "csrc/common/few_rows.h",
        "store_part(y + n, load_part(y + n, outputs - n) + load_part(more + n, outputs - n),",
        "store_part(y + n, load_part(more + n, outputs - n),",
        "tests/optimize/test_heads.py",
    ),
    Mutant(
        "more-rows-than-few-read-the-first-ones",
        f"{FOLDER}/conv_head_cpu.cpp",
        "add_few_rows({x + b * C, C,",
        "add_few_rows({x, C,",
        "tests/optimize/test_heads.py",
    ),
    Mutant(
        "gradient-of-few-rows-takes-other-columns",
        "csrc/concat_linear/concat_linear_few_cpu.cpp",
        "args.weight + in.column + begin, args.C, in.grad_x",
        "args.weight + begin, args.C, in.grad_x",
        "tests/ops/test_concat_linear_native.py",
    ),
    Mutant(
        "factors-of-the-first-image-for-all",
        GATE,
        "const float* f = ready + p / map.pixels * map.C;",
        "const float* f = ready;",
        GATING,
    ),
    Mutant(
        "hardsigmoid-without-its-upper-end",
        GATE,
        "z = z > set1(6.0f) ? set1(6.0f) : z;",
        "",
        GATING,
    ),
    Mutant(
        "map-in-scratch-given-away-while-it-is-read",
        "mbm_kernels/optimize/runs.py",
        "return in_use[x][0] if x in in_use and last_use[x] == i else None",
        "return in_use[x][0] if x in in_use else None",
        GATING,
    ),
)
