// The register tiles of the packed GEMM: C[MR, NP * kPanel] (+)= A[MR, K] B[K, NP * kPanel].
//
// One order of accumulation everywhere: an element of C is a chain of multiply-adds from 0 over
// each kChain values of k, and chains are added to C in order. So its bits depend neither on the
// tile it falls in, nor on its neighbours, nor on the threads; and the error grows with sqrt(K *
// kChain), not with K (half that of one chain at K = 256, for 3 % of the time).
#pragma once

#include "common/simd.h"

namespace mbm::MBM_ISA {

constexpr int kPanel = 2 * kLanes;               // columns of a packed panel of B
constexpr int kMaxRows = kLanes == 16 ? 14 : 6;  // 28 of 32, or 12 of 16, registers hold C
constexpr int64_t kChain = 64;
constexpr int kMaxPanels = 4;  // panels side by side, so that few rows still fill the FMA pipes

constexpr bool micro_fits(int rows, int panels) {
  return rows <= kMaxRows && rows * panels <= (kLanes == 16 ? 14 : 6);
}

// a: element (i, k) at a[k * a_step + i].  b: panel p at b + p * b_step, [K, kPanel].
// c: row i, panel p at c + i * ldc + p * kPanel. Nothing overlaps; no alignment is needed.
using MicroFn = void (*)(int64_t K, const float* a, int64_t a_step, const float* b, int64_t b_step,
                         float* c, int64_t ldc, bool accumulate);

template <int MR, int NP>
void micro_kernel(int64_t K, const float* __restrict a, int64_t a_step, const float* __restrict b,
                  int64_t b_step, float* __restrict c, int64_t ldc, bool accumulate) {
  // C comes from memory when it is a large gradient: 15 % of the product for grad_weight.
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 2 * NP; ++j) __builtin_prefetch(c + i * ldc + j * kLanes, 1);
  do {
    const float* end = b + (K < kChain ? K : kChain) * kPanel;
    K -= kChain;
    vf acc[MR][2 * NP];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < 2 * NP; ++j) acc[i][j] = zero();
    for (; b < end; b += kPanel, a += a_step) {
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) {
        const vf b0 = load(b + p * b_step), b1 = load(b + p * b_step + kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const vf ai = set1(a[i]);
          acc[i][2 * p] = fma(ai, b0, acc[i][2 * p]);
          acc[i][2 * p + 1] = fma(ai, b1, acc[i][2 * p + 1]);
        }
      }
    }
    if (accumulate) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * NP; ++j) {
          float* at = c + i * ldc + j * kLanes;
          store(at, load(at) + acc[i][j]);
        }
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * NP; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
    }
    accumulate = true;
  } while (K > 0);
}

template <int MR, int NP>
constexpr MicroFn micro_or_null() {
  if constexpr (micro_fits(MR, NP))
    return micro_kernel<MR, NP>;
  else
    return nullptr;
}

#define MBM_MICRO_ROW(MR) \
  {micro_or_null<MR, 1>(), micro_or_null<MR, 2>(), micro_or_null<MR, 3>(), micro_or_null<MR, 4>()}
// rows 1 to kMaxRows, panels 1 to kMaxPanels; micro_fits() must hold.
inline MicroFn micro_for(int rows, int panels) {
  static constexpr MicroFn table[14][kMaxPanels] = {
      MBM_MICRO_ROW(1),  MBM_MICRO_ROW(2),  MBM_MICRO_ROW(3),  MBM_MICRO_ROW(4), MBM_MICRO_ROW(5),
      MBM_MICRO_ROW(6),  MBM_MICRO_ROW(7),  MBM_MICRO_ROW(8),  MBM_MICRO_ROW(9), MBM_MICRO_ROW(10),
      MBM_MICRO_ROW(11), MBM_MICRO_ROW(12), MBM_MICRO_ROW(13), MBM_MICRO_ROW(14)};
  return table[rows - 1][panels - 1];
}
#undef MBM_MICRO_ROW

// Panels in one register tile when `panels` lie side by side: 5 go as 3 + 2 rather than 4 + 1,
// since a lone panel of one row leaves the FMA pipes idle.
inline int panels_at_once(int rows, int64_t panels) {
  int most = kMaxPanels;
  while (most > 1 && !micro_fits(rows, most)) --most;
  const int64_t tiles = (panels + most - 1) / most;
  return static_cast<int>((panels + tiles - 1) / tiles);
}

// `panels` panels side by side for `rows` rows over the whole of K.
inline void micro_rows(int rows, int64_t panels, int64_t K, const float* a, int64_t a_step,
                       const float* b, int64_t b_step, float* c, int64_t ldc, bool accumulate) {
  while (panels > 0) {
    const int now = panels_at_once(rows, panels);
    micro_for(rows, now)(K, a, a_step, b, b_step, c, ldc, accumulate);
    panels -= now;
    b += now * b_step;
    c += now * kPanel;
  }
}

// Rows cut evenly into tiles of at most kMaxRows: 16 rows as 8 + 8, not 14 + 2.
struct RowTiles {
  int64_t rows, tiles;
  explicit RowTiles(int64_t n) : rows(n), tiles((n + kMaxRows - 1) / kMaxRows) {}
  int64_t begin(int64_t tile) const { return tile * rows / tiles; }
  int size(int64_t tile) const { return static_cast<int>(begin(tile + 1) - begin(tile)); }
};

}  // namespace mbm::MBM_ISA
