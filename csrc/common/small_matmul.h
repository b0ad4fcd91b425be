// Products whose operands are read where they lie, through strides: for tens of rows against
// hundreds, where packing panels would cost as much as the product.
//
// Each element of a result is summed in an order that J or E alone decide, so its bits depend
// neither on the tile it falls in nor on its neighbours.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace mbm::MBM_ISA {
namespace {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

constexpr int kMatmulRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
// A chain of multiply-adds; longer sums add chains, and a slice of m stays in L2.
constexpr int64_t kMatmulChain = 512;

// Vectors side by side: few rows take many, so that the FMA pipes have 8 chains each.
constexpr int columns_for(int rows) { return rows >= 4 ? 2 : 8 / rows; }

// a(i, j) is a[j * a_stride + i] if `transposed`, else a[i * a_stride + j].
struct MatmulOperands {
  int64_t J, E;
  const float* a;
  int64_t a_stride;
  const float* m;
  int64_t m_stride;
  float* out;
  int64_t out_stride;
  bool add;
};

// `columns` vectors from e on, of the last of which `width` lanes where it is a `tail`.
template <int rows, int columns, bool tail, bool transposed>
inline void matmul_block(const MatmulOperands& o, int64_t e, int width) {
  const float* __restrict a = o.a;
  const float* __restrict m = o.m + e;
  vf sum[rows][columns] = {};
  for (int64_t j = o.J; j > 0; --j, m += o.m_stride, a += transposed ? o.a_stride : 1) {
    vf x[columns];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c)
      x[c] = tail && c == columns - 1 ? load_n(m + c * kLanes, width) : load(m + c * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const vf w = set1(a[transposed ? i : i * o.a_stride]);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) sum[i][c] = fma(w, x[c], sum[i][c]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      float* p = o.out + i * o.out_stride + e + c * kLanes;
      const bool part = tail && c == columns - 1;
      vf v = sum[i][c];
      if (o.add) v = v + (part ? load_n(p, width) : load(p));
      if (part)
        store_n(p, v, width);
      else
        store(p, v);
    }
}

template <int rows, bool transposed, int columns = columns_for(rows)>
void matmul_rows(const MatmulOperands& o, int64_t e = 0) {
  for (; e + columns * kLanes <= o.E; e += columns * kLanes)
    matmul_block<rows, columns, false, transposed>(o, e, kLanes);
  if (e == o.E) return;
  if constexpr (columns > 2) {
    matmul_rows<rows, transposed, columns / 2>(o, e);
  } else if (e + kLanes < o.E) {
    matmul_block<rows, 2, true, transposed>(o, e, static_cast<int>(o.E - e - kLanes));
  } else if (e + kLanes == o.E) {
    matmul_block<rows, 1, false, transposed>(o, e, kLanes);
  } else {
    matmul_block<rows, 1, true, transposed>(o, e, static_cast<int>(o.E - e));
  }
}

template <bool transposed>
inline void matmul_rows_of(int rows, const MatmulOperands& o) {
  using Rows = void (*)(const MatmulOperands&, int64_t);
  static constexpr Rows table[] = {
      matmul_rows<1, transposed>,  matmul_rows<2, transposed>,  matmul_rows<3, transposed>,
      matmul_rows<4, transposed>,
#if MBM_LANES >= 8
      matmul_rows<5, transposed>,  matmul_rows<6, transposed>,
#endif
#if MBM_LANES >= 16
      matmul_rows<7, transposed>,  matmul_rows<8, transposed>,  matmul_rows<9, transposed>,
      matmul_rows<10, transposed>, matmul_rows<11, transposed>, matmul_rows<12, transposed>,
#endif
  };
  static_assert(sizeof(table) / sizeof(table[0]) == kMatmulRows);
  table[rows - 1](o, 0);
}

template <bool transposed>
inline void matmul_sliced(int64_t I, MatmulOperands o) {
  const int64_t tiles = (I + kMatmulRows - 1) / kMatmulRows;
  const MatmulOperands all = o;
  int64_t j = 0;
  do {
    o.J = all.J - j < kMatmulChain ? all.J - j : kMatmulChain;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t i = tile * I / tiles, end = (tile + 1) * I / tiles;
      o.a = all.a + (transposed ? j * o.a_stride + i : i * o.a_stride + j);
      o.m = all.m + j * o.m_stride;
      o.out = all.out + i * o.out_stride;
      matmul_rows_of<transposed>(static_cast<int>(end - i), o);
    }
    j += o.J;
    o.add = true;
  } while (j < all.J);
}

// out[i, e] (+)= sum_j a[i, j] m[j, e]: out [I, E], a [I, J], m [J, E], rows contiguous.
inline void matmul(int64_t I, int64_t J, int64_t E, const float* a, int64_t a_stride,
                   const float* m, int64_t m_stride, float* out, int64_t out_stride,
                   bool add = false) {
  matmul_sliced<false>(I, {J, E, a, a_stride, m, m_stride, out, out_stride, add});
}

// out[i, e] (+)= sum_j a[j, i] m[j, e]: out [I, E], a [J, I], m [J, E], rows contiguous.
inline void matmul_tn(int64_t I, int64_t J, int64_t E, const float* a, int64_t a_stride,
                      const float* m, int64_t m_stride, float* out, int64_t out_stride,
                      bool add = false) {
  matmul_sliced<true>(I, {J, E, a, a_stride, m, m_stride, out, out_stride, add});
}

constexpr int kDotRows = kLanes / 4;  // kDotRows x 4 sums fill one sum_rows()

// rows x kLanes / rows dot products over E. Rows of m past `left` read the last one again.
template <int rows>
inline void dot_tile(int64_t E, const float* a, int64_t a_stride, const float* m, int64_t m_stride,
                     int64_t left, float* out, int64_t out_stride) {
  constexpr int columns = kLanes / rows;
  const float* mj[columns];
  for (int j = 0; j < columns; ++j) mj[j] = m + (j < left ? j : left - 1) * m_stride;
  vf sum[kLanes] = {};
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes) {
    vf x[columns];
#pragma GCC unroll 16
    for (int j = 0; j < columns; ++j) x[j] = load(mj[j] + e);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const vf y = load(a + i * a_stride + e);
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) sum[i * columns + j] = fma(y, x[j], sum[i * columns + j]);
    }
  }
  if (e < E) {
    const int tail = static_cast<int>(E - e);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const vf y = load_n(a + i * a_stride + e, tail);
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j)
        sum[i * columns + j] = fma(y, load_n(mj[j] + e, tail), sum[i * columns + j]);
    }
  }
  alignas(64) float lanes[kLanes];
  store(lanes, sum_rows(sum));
  if (left >= columns) {
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) out[i * out_stride + j] = lanes[i * columns + j];
  } else {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < left; ++j) out[i * out_stride + j] = lanes[i * columns + j];
  }
}

template <int rows>
inline void dot_rows(int64_t I, int64_t J, int64_t E, const float* a, int64_t a_stride,
                     const float* m, int64_t m_stride, float* out, int64_t out_stride) {
  constexpr int columns = kLanes / rows;
  const int64_t whole = I / rows * rows;
  for (int64_t j = 0; j < J && whole > 0; j += columns)
    for (int64_t i = 0; i < whole; i += rows)
      dot_tile<rows>(E, a + i * a_stride, a_stride, m + j * m_stride, m_stride, J - j,
                     out + i * out_stride + j, out_stride);
  if constexpr (rows > 1) {
    if (whole < I)
      dot_rows<rows / 2>(I - whole, J, E, a + whole * a_stride, a_stride, m, m_stride,
                         out + whole * out_stride, out_stride);
  }
}

// out[i, j] = sum_e a[i, e] m[j, e]: out [I, J], a [I, E], m [J, E], rows contiguous. Each tile of
// m meets all of a, which ought to fit L1.
inline void matmul_nt(int64_t I, int64_t J, int64_t E, const float* a, int64_t a_stride,
                      const float* m, int64_t m_stride, float* out, int64_t out_stride) {
  dot_rows<kDotRows>(I, J, E, a, a_stride, m, m_stride, out, out_stride);
}

}  // namespace
}  // namespace mbm::MBM_ISA
