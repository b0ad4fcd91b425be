// Layouts of the packed GEMM.
//   A tile, `rows` <= kMaxRows rows:  [K, rows], so that a step of k broadcasts adjacent floats.
//   B panel, kPanel columns:          [K, kPanel], missing columns 0.
#pragma once

#include "common/gemm_micro.h"
#include "common/parallel.h"

namespace mbm::MBM_ISA {

// Rows of contiguous floats: evenly spaced, or anywhere when `at` lists their addresses.
struct Rows {
  const float* base = nullptr;
  int64_t stride = 0;
  const float* const* at = nullptr;
  const float* operator()(int64_t r) const { return at ? at[r] : base + r * stride; }
};

typedef float quad __attribute__((vector_size(16)));
typedef float quad_unaligned __attribute__((vector_size(16), aligned(4), may_alias));
inline quad load_quad(const float* p) { return *reinterpret_cast<const quad_unaligned*>(p); }
inline void store_quad(float* p, quad v) { *reinterpret_cast<quad_unaligned*>(p) = v; }

// dst[k * step + i] = row_i[k] for four rows and k < count.
inline void transpose_four_rows(const float* r0, const float* r1, const float* r2, const float* r3,
                                int64_t count, float* dst, int64_t step) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const quad a = load_quad(r0 + k), b = load_quad(r1 + k);
    const quad c = load_quad(r2 + k), d = load_quad(r3 + k);
    const quad ab_lo = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const quad ab_hi = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const quad cd_lo = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const quad cd_hi = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    float* out = dst + k * step;
    store_quad(out, __builtin_shufflevector(ab_lo, cd_lo, 0, 1, 4, 5));
    store_quad(out + step, __builtin_shufflevector(ab_lo, cd_lo, 2, 3, 6, 7));
    store_quad(out + 2 * step, __builtin_shufflevector(ab_hi, cd_hi, 0, 1, 4, 5));
    store_quad(out + 3 * step, __builtin_shufflevector(ab_hi, cd_hi, 2, 3, 6, 7));
  }
  for (; k < count; ++k) {
    float* out = dst + k * step;
    out[0] = r0[k];
    out[1] = r1[k];
    out[2] = r2[k];
    out[3] = r3[k];
  }
}

// dst[k * step + i] = rows(r0 + i)[k0 + k], i < count, k < depth.
inline void transpose_rows(const Rows& rows, int64_t r0, int count, int64_t k0, int64_t depth,
                           float* dst, int64_t step) {
  int i = 0;
  for (; i + 4 <= count; i += 4)
    transpose_four_rows(rows(r0 + i) + k0, rows(r0 + i + 1) + k0, rows(r0 + i + 2) + k0,
                        rows(r0 + i + 3) + k0, depth, dst + i, step);
  for (; i < count; ++i) {
    const float* row = rows(r0 + i) + k0;
    for (int64_t k = 0; k < depth; ++k) dst[k * step + i] = row[k];
  }
}

// dst[k * step + j] = rows(k0 + k)[c0 + j], j < count, k < depth.
inline void copy_columns(const Rows& rows, int64_t c0, int count, int64_t k0, int64_t depth,
                         float* dst, int64_t step) {
  constexpr int64_t kAhead = 32;  // rows: narrow columns of a large array miss every cache
  const int whole = count / kLanes * kLanes, tail = count - whole;
  for (int64_t k = 0; k < depth; ++k) {
    const float* src = rows(k0 + k) + c0;
    if (k + kAhead < depth) __builtin_prefetch(rows(k0 + k + kAhead) + c0);
    float* out = dst + k * step;
    for (int j = 0; j < whole; j += kLanes) store(out + j, load(src + j));
    if (tail > 0) store_n(out + whole, load_n(src + whole, tail), tail);
  }
}

inline int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

// One panel: columns c0 .. c0 + count of B(k, n), where rows are k (a [K, N] array) or, with
// `by_column`, n (a weight [N, K]).
inline void pack_panel(const Rows& rows, bool by_column, int64_t c0, int count, int64_t K,
                       float* dst) {
  if (count < kPanel)
    for (int64_t k = 0; k < K; ++k)
      for (int j = count; j < kPanel; ++j) dst[k * kPanel + j] = 0.0f;
  if (by_column)
    transpose_rows(rows, c0, count, 0, K, dst, kPanel);
  else
    copy_columns(rows, c0, count, 0, K, dst, kPanel);
}

// All panels of B [K, N] into dst: panels_of(N) * K * kPanel floats.
inline void pack_b(int num_threads, const Rows& rows, bool by_column, int64_t N, int64_t K,
                   float* dst) {
  const int threads = N * K < 32768 ? 1 : num_threads;
  parallel_for(threads, panels_of(N), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t left = N - p * kPanel;
      pack_panel(rows, by_column, p * kPanel, static_cast<int>(left < kPanel ? left : kPanel), K,
                 dst + p * K * kPanel);
    }
  });
}

}  // namespace mbm::MBM_ISA
