// Register tiles of a convolution: C[MR, 2 kLanes] = sum over segments of A[MR, depth] B[depth, 2
// kLanes]. The rows of A are pixels (or Winograd tiles) a fixed number of floats apart, so that
// all of their addresses are one register and a constant.
#pragma once

#include "common/gemm_pack.h"

namespace mbm::MBM_ISA {

// `depth` values of k from a + offset on; B holds the segments one after another.
struct Segment {
  int64_t offset, depth;
};

using ConvMicroFn = void (*)(const Segment* segments, int64_t count, const float* a, int64_t step,
                             const float* b, float* c, bool add);

// step: floats between the rows of A where STEP is 0. c: row i at c + i * kPanel; with `add` the
// sums are added to what is there, at the end: a sum of slices rounds less than one long sum. NV
// vectors of each row are computed. beside() runs for each k.
template <int MR, int NV, int STEP, class Beside>
inline __attribute__((always_inline)) void conv_sums(const Segment* segments, int64_t count,
                                                     const float* a_base, int64_t step,
                                                     const float* __restrict b, float* __restrict c,
                                                     bool add, const Beside& beside) {
  if constexpr (STEP > 0) step = STEP;
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = zero();
  for (int64_t s = 0; s < count; ++s) {
    const float* a = a_base + segments[s].offset;
    const float* end = b + segments[s].depth * kPanel;
    for (; b < end; b += kPanel, ++a) {
      // Rows of A overlap where a pixel has few channels; kept in registers over the turns of the
      // loop they would spill the sums.
      asm("" : "+r"(a));
      beside();
      vf v[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) v[j] = load(b + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const vf ai = set1(a[i * step]);
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[i][j] = fma(ai, v[j], acc[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      float* at = c + i * kPanel + j * kLanes;
      store(at, add ? load(at) + acc[i][j] : acc[i][j]);
    }
}

template <int MR, int NV, int STEP>
void conv_micro(const Segment* segments, int64_t count, const float* a, int64_t step,
                const float* __restrict b, float* __restrict c, bool add) {
  conv_sums<MR, NV, STEP>(segments, count, a, step, b, c, add, [] {});
}

// Memory to fetch meanwhile, some bytes for each k: what is read, written and added next.
struct Fetch {
  const char *in, *out, *residual;
  int64_t in_step, out_step, residual_step;
};

// Rows of `depth` neighbours, `step` floats apart.
using RowsMicroFn = void (*)(int64_t depth, const float* a, int64_t step, const float* b, float* c,
                             bool add, Fetch& fetch);

// fetches: how many of the three. A burst of prefetches between tiles took 30 % longer for 256
// channels, y left out 15 % for 256 outputs.
template <int MR, int NV, int fetches>
void rows_micro(int64_t depth, const float* a, int64_t step, const float* __restrict b,
                float* __restrict c, bool add, Fetch& fetch) {
  const Segment all{0, depth};
  Fetch now = fetch;
  conv_sums<MR, NV, 0>(&all, 1, a, step, b, c, add, [&] {
    if constexpr (fetches > 0) {
      __builtin_prefetch(now.in);
      __builtin_prefetch(now.out, 1);
      now.in += now.in_step;
      now.out += now.out_step;
    }
    if constexpr (fetches == 3) {
      __builtin_prefetch(now.residual);
      now.residual += now.residual_step;
    }
  });
  fetch = now;
}

// Vectors of a panel of `columns` columns that need computing.
inline int vectors_of(int64_t columns) { return columns > kLanes ? 2 : 1; }

template <int MR, int STEP>
constexpr ConvMicroFn conv_micro_or_null(int vectors) {
  if constexpr (MR <= kMaxRows)
    return vectors == 2 ? conv_micro<MR, 2, STEP> : conv_micro<MR, 1, STEP>;
  else
    return nullptr;
}

// Any number of rows up to kMaxRows, kLanes floats apart: Winograd's tiles.
inline ConvMicroFn tiles_micro(int rows, int vectors) {
#define MBM_TILES(MR)                                                    \
  {                                                                      \
    conv_micro_or_null<MR, kLanes>(1), conv_micro_or_null<MR, kLanes>(2) \
  }
  static constexpr ConvMicroFn table[14][2] = {
      MBM_TILES(1),  MBM_TILES(2),  MBM_TILES(3),  MBM_TILES(4), MBM_TILES(5),
      MBM_TILES(6),  MBM_TILES(7),  MBM_TILES(8),  MBM_TILES(9), MBM_TILES(10),
      MBM_TILES(11), MBM_TILES(12), MBM_TILES(13), MBM_TILES(14)};
#undef MBM_TILES
  return table[rows - 1][vectors - 1];
}

template <int MR, int NV>
constexpr RowsMicroFn rows_micro_or_null(int fetches) {
  if constexpr (MR > kMaxRows)
    return nullptr;
  else if (fetches == 0)
    return rows_micro<MR, NV, 0>;
  else
    return fetches == 2 ? rows_micro<MR, NV, 2> : rows_micro<MR, NV, 3>;
}

// fetches: 0, 2 or 3, see rows_micro.
inline RowsMicroFn rows_micro_for(int rows, int vectors, int fetches) {
#define MBM_ROWS_OF(MR, NV) \
  {rows_micro_or_null<MR, NV>(0), rows_micro_or_null<MR, NV>(2), rows_micro_or_null<MR, NV>(3)}
#define MBM_ROWS(MR)                       \
  {                                        \
    MBM_ROWS_OF(MR, 1), MBM_ROWS_OF(MR, 2) \
  }
  static constexpr RowsMicroFn table[14][2][3] = {
      MBM_ROWS(1),  MBM_ROWS(2),  MBM_ROWS(3),  MBM_ROWS(4), MBM_ROWS(5),
      MBM_ROWS(6),  MBM_ROWS(7),  MBM_ROWS(8),  MBM_ROWS(9), MBM_ROWS(10),
      MBM_ROWS(11), MBM_ROWS(12), MBM_ROWS(13), MBM_ROWS(14)};
#undef MBM_ROWS
#undef MBM_ROWS_OF
  return table[rows - 1][vectors - 1][fetches > 0 ? fetches - 1 : 0];
}

// kMaxRows pixels, or half as many, `step` floats apart.
inline ConvMicroFn pixels_micro(bool half, int vectors, int64_t step) {
  constexpr int kHalf = kMaxRows / 2;
#define MBM_STEP(STEP)                                     \
  case STEP:                                               \
    return half ? conv_micro_or_null<kHalf, STEP>(vectors) \
                : conv_micro_or_null<kMaxRows, STEP>(vectors)
  switch (step) {
    MBM_STEP(1);
    MBM_STEP(2);
    MBM_STEP(3);
    MBM_STEP(6);
    MBM_STEP(kLanes);
    MBM_STEP(2 * kLanes);
    default:
      return half ? conv_micro_or_null<kHalf, 0>(vectors)
                  : conv_micro_or_null<kMaxRows, 0>(vectors);
  }
#undef MBM_STEP
}

using OuterMicroFn = void (*)(int64_t rows, int64_t n, const float* a, int64_t a_step,
                              int64_t a_row, const float* b, int64_t b_step, int64_t b_row,
                              float* c, bool accumulate);

// C[MR, kPanel] (+)= sum over `rows` runs of n pixels of the products of a[i] and b: a weight's
// gradient. Pixel p of run r: a + r * a_row + p * a_step, b + r * b_row + p * b_step.
template <int MR, int NV>
void outer_micro(int64_t rows, int64_t n, const float* a_base, int64_t a_step, int64_t a_row,
                 const float* b_base, int64_t b_step, int64_t b_row, float* __restrict c,
                 bool accumulate) {
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = zero();
  for (int64_t r = 0; r < rows; ++r) {
    const float* a = a_base + r * a_row;
    const float* b = b_base + r * b_row;
    for (int64_t p = 0; p < n; ++p, a += a_step, b += b_step) {
      vf v[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) v[j] = load(b + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const vf ai = set1(a[i]);
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[i][j] = fma(ai, v[j], acc[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      float* at = c + i * kPanel + j * kLanes;
      store(at, accumulate ? load(at) + acc[i][j] : acc[i][j]);
    }
}

template <int MR>
constexpr OuterMicroFn outer_micro_or_null(int vectors) {
  if constexpr (MR <= kMaxRows)
    return vectors == 2 ? outer_micro<MR, 2> : outer_micro<MR, 1>;
  else
    return nullptr;
}

inline OuterMicroFn outer_micro_for(int rows, int vectors) {
#define MBM_OUTER(MR)                                      \
  {                                                        \
    outer_micro_or_null<MR>(1), outer_micro_or_null<MR>(2) \
  }
  static constexpr OuterMicroFn table[14][2] = {
      MBM_OUTER(1),  MBM_OUTER(2),  MBM_OUTER(3),  MBM_OUTER(4), MBM_OUTER(5),
      MBM_OUTER(6),  MBM_OUTER(7),  MBM_OUTER(8),  MBM_OUTER(9), MBM_OUTER(10),
      MBM_OUTER(11), MBM_OUTER(12), MBM_OUTER(13), MBM_OUTER(14)};
#undef MBM_OUTER
  return table[rows - 1][vectors - 1];
}

}  // namespace mbm::MBM_ISA
