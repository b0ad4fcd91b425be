// The two small products beside the scores: weights times value, and its two gradients. Sizes are a
// batch element's (T of 1 to 100, S and E of hundreds), where packing panels would not pay.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int kRowBlock = kLanes == 16 ? 8 : 4;
// Vectors side by side: few rows take many, so that a row of m is read in long runs.
constexpr int columns_for(int rows) { return rows >= 4 ? 2 : 8 / rows; }

template <int rows, int columns, bool tail>
inline void matmul_block(int64_t J, const float* a, int64_t a_stride_i, int64_t a_stride_j,
                         const float* m, int64_t m_stride_j, float* out, int64_t out_stride_i,
                         int width) {
  vf sum[rows][columns] = {};
  for (int64_t j = 0; j < J; ++j) {
    vf x[columns];
    for (int c = 0; c < columns; ++c) {
      const float* p = m + j * m_stride_j + c * kLanes;
      x[c] = tail ? load_n(p, width) : load(p);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const vf w = set1(a[i * a_stride_i + j * a_stride_j]);
      for (int c = 0; c < columns; ++c) sum[i][c] = fma(w, x[c], sum[i][c]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int c = 0; c < columns; ++c) {
      float* p = out + i * out_stride_i + c * kLanes;
      if (tail) {
        store_n(p, sum[i][c], width);
      } else {
        store(p, sum[i][c]);
      }
    }
}

template <int rows>
inline void matmul_row_block(int64_t I, int64_t J, int64_t E, const float* a, int64_t a_stride_i,
                             int64_t a_stride_j, const float* m, int64_t m_stride_j, float* out,
                             int64_t out_stride_i) {
  int64_t i = 0;
  for (; i + rows <= I; i += rows) {
    const float* ai = a + i * a_stride_i;
    float* oi = out + i * out_stride_i;
    int64_t e = 0;
    constexpr int columns = columns_for(rows);
    for (; e + columns * kLanes <= E; e += columns * kLanes)
      matmul_block<rows, columns, false>(J, ai, a_stride_i, a_stride_j, m + e, m_stride_j, oi + e,
                                         out_stride_i, kLanes);
    for (; e + kLanes <= E; e += kLanes)
      matmul_block<rows, 1, false>(J, ai, a_stride_i, a_stride_j, m + e, m_stride_j, oi + e,
                                   out_stride_i, kLanes);
    if (e < E)
      matmul_block<rows, 1, true>(J, ai, a_stride_i, a_stride_j, m + e, m_stride_j, oi + e,
                                  out_stride_i, static_cast<int>(E - e));
  }
  if constexpr (rows > 1) {
    if (i < I)
      matmul_row_block<rows / 2>(I - i, J, E, a + i * a_stride_i, a_stride_i, a_stride_j, m,
                                 m_stride_j, out + i * out_stride_i, out_stride_i);
  }
}

// out[i, e] = sum_j a[i, j] m[j, e]: out [I, E], a [I, J] through two strides, m [J, E].
inline void matmul(int64_t I, int64_t J, int64_t E, const float* a, int64_t a_stride_i,
                   int64_t a_stride_j, const float* m, int64_t m_stride_j, float* out,
                   int64_t out_stride_i) {
  matmul_row_block<kRowBlock>(I, J, E, a, a_stride_i, a_stride_j, m, m_stride_j, out, out_stride_i);
}

constexpr int kDotRows = kLanes / 4;  // kDotRows x 4 sums fill one sum_rows()

template <int rows, int columns>
inline void dot_block(int64_t E, const float* a, int64_t a_stride_i, const float* m,
                      int64_t m_stride_j, float* out, int64_t out_stride_i) {
  vf sum[kLanes] = {};
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes) {
    vf x[columns];
    for (int j = 0; j < columns; ++j) x[j] = load(m + j * m_stride_j + e);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const vf y = load(a + i * a_stride_i + e);
      for (int j = 0; j < columns; ++j) sum[i * 4 + j] = fma(y, x[j], sum[i * 4 + j]);
    }
  }
  if (e < E) {
    const int tail = static_cast<int>(E - e);
    for (int i = 0; i < rows; ++i) {
      const vf y = load_n(a + i * a_stride_i + e, tail);
      for (int j = 0; j < columns; ++j)
        sum[i * 4 + j] = fma(y, load_n(m + j * m_stride_j + e, tail), sum[i * 4 + j]);
    }
  }
  alignas(64) float lanes[kLanes];
  store(lanes, sum_rows(sum));
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) out[i * out_stride_i + j] = lanes[i * 4 + j];
}

template <int rows>
inline void dot_row_block(int64_t I, int64_t J, int64_t E, const float* a, int64_t a_stride_i,
                          const float* m, int64_t m_stride_j, float* out, int64_t out_stride_i) {
  int64_t i = 0;
  for (; i + rows <= I; i += rows) {
    const float* ai = a + i * a_stride_i;
    float* oi = out + i * out_stride_i;
    int64_t j = 0;
    for (; j + 4 <= J; j += 4)
      dot_block<rows, 4>(E, ai, a_stride_i, m + j * m_stride_j, m_stride_j, oi + j, out_stride_i);
    for (; j < J; ++j)
      dot_block<rows, 1>(E, ai, a_stride_i, m + j * m_stride_j, m_stride_j, oi + j, out_stride_i);
  }
  if constexpr (rows > 1) {
    if (i < I)
      dot_row_block<rows / 2>(I - i, J, E, a + i * a_stride_i, a_stride_i, m, m_stride_j,
                              out + i * out_stride_i, out_stride_i);
  }
}

// out[i, j] = sum_e a[i, e] m[j, e]: out [I, J], a [I, E], m [J, E].
inline void matmul_transposed(int64_t I, int64_t J, int64_t E, const float* a, int64_t a_stride_i,
                              const float* m, int64_t m_stride_j, float* out,
                              int64_t out_stride_i) {
  dot_row_block<kDotRows>(I, J, E, a, a_stride_i, m, m_stride_j, out, out_stride_i);
}

}  // namespace
}  // namespace mbm::MBM_ISA
