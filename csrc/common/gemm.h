// C [M, N] (+)= A [M, K] B [K, N] with B packed in panels (gemm_pack.h) and A packed on the way.
// Share of the FMA peak measured on a Zen 5 core at M = N = K = 1024: 91 % at 8 and at 16 lanes.
#pragma once

#include <atomic>

#include "common/gemm_pack.h"
#include "common/scratch.h"

namespace mbm::MBM_ISA {

struct GemmOperands {
  int64_t M, N, K;
  Rows a;  // rows of A, or with a_transposed the K rows of its transpose
  bool a_transposed;
  const float* b;  // panel p at b + p * b_step, [K, kPanel]
  int64_t b_step;  // K * kPanel, or more for a slice of K of a deeper pack
  float* c;        // row m at c + m * ldc, or at c_rows[m]
  int64_t ldc;
  float* const* c_rows;
  bool accumulate;
  int64_t a_fold = 0;       // if not 0, A's columns lie in runs of kPanel, run q at a + q * a_fold
  int64_t c_step = kPanel;  // panel p of C at row + p * c_step; if not kPanel, all panels are whole
  float* row(int64_t m) const { return c_rows ? c_rows[m] : c + m * ldc; }
};

// Rows m0 .. m0 + rows of a slice of A as [depth, rows].
inline void pack_a(const GemmOperands& g, int64_t m0, int rows, int64_t k, int64_t depth,
                   float* dst) {
  if (g.a_transposed) {
    copy_columns(g.a, m0, rows, k, depth, dst, rows);
  } else if (g.a_fold == 0) {
    transpose_rows(g.a, m0, rows, k, depth, dst, rows);
  } else {
    for (int64_t q = 0; q < depth; q += kPanel) {
      const Rows run{g.a.base + (k + q) / kPanel * g.a_fold, g.a.stride};
      transpose_rows(run, m0, rows, 0, depth - q < kPanel ? depth - q : kPanel, dst + q * rows,
                     rows);
    }
  }
}

// The epilogue is called once for each finished vector of C: the value stored is
// epilogue(sum, m, n) for columns n .. n + kLanes, of which the last may lie past N.
struct StoreAsIs {
  vf operator()(vf sum, int64_t, int64_t) const { return sum; }
};
template <class Epilogue>
struct is_store_as_is {
  static constexpr bool value = false;
};
template <>
struct is_store_as_is<StoreAsIs> {
  static constexpr bool value = true;
};

// K is cut into slices of whole chains: a slice of a panel of B is 32 KiB at 16 lanes and stays in
// L1.
constexpr int64_t kSlice = 4 * kChain;
// Eight row tiles of a slice of A: 112 KiB at 16 lanes, in L2 while every panel of B passes.
constexpr int64_t kTilesPerBlock = 8;
constexpr int64_t kPackedA = kTilesPerBlock * kMaxRows * kSlice;

// One register tile whose C cannot be written in place: columns past N, scattered rows, an
// epilogue.
template <class Epilogue>
void gemm_edge_tile(const GemmOperands& g, int64_t m0, int rows, int64_t p0, int panels,
                    MicroFn micro, int64_t depth, const float* a, const float* b, bool add,
                    bool last, const Epilogue& epilogue) {
  alignas(64) float tile[kMaxRows * kMaxPanels * kPanel];
  const int64_t ld = panels * kPanel, n0 = p0 * kPanel;
  const int64_t width = g.N - n0 < ld ? g.N - n0 : ld;
  if (add)
    for (int i = 0; i < rows; ++i)
      for (int64_t n = 0; n < width; n += kLanes)
        store(tile + i * ld + n, load_part(g.row(m0 + i) + n0 + n, width - n));
  micro(depth, a, rows, b, g.b_step, tile, ld, add);
  for (int i = 0; i < rows; ++i) {
    float* out = g.row(m0 + i) + n0;
    for (int64_t n = 0; n < width; n += kLanes) {
      vf v = load(tile + i * ld + n);
      if (last) v = epilogue(v, m0 + i, n0 + n);
      store_part(out + n, v, width - n);
    }
  }
}

// Rows [m_begin, m_end), panels [p_begin, p_end) on this thread; packed_a: kPackedA floats.
template <class Epilogue = StoreAsIs>
void gemm_block(const GemmOperands& g, int64_t m_begin, int64_t m_end, int64_t p_begin,
                int64_t p_end, float* packed_a, const Epilogue& epilogue = Epilogue()) {
  const RowTiles tiles(m_end - m_begin);
  for (int64_t t0 = 0; t0 < tiles.tiles; t0 += kTilesPerBlock) {
    const int64_t t1 = t0 + kTilesPerBlock < tiles.tiles ? t0 + kTilesPerBlock : tiles.tiles;
    const int64_t block = tiles.begin(t0);
    int64_t k = 0;
    do {
      const int64_t depth = g.K - k < kSlice ? g.K - k : kSlice;
      const bool add = g.accumulate || k > 0, last = k + depth == g.K;
      for (int64_t t = t0; t < t1; ++t) {
        float* dst = packed_a + (tiles.begin(t) - block) * depth;
        pack_a(g, m_begin + tiles.begin(t), tiles.size(t), k, depth, dst);
      }
      for (int64_t p = p_begin; p < p_end;) {
        const bool alone = t1 - t0 > 1 || g.c_step != kPanel;
        const int panels = alone ? 1 : panels_at_once(tiles.size(t0), p_end - p);
        const bool full = (p + panels) * kPanel <= g.N && !g.c_rows;
        const float* b = g.b + p * g.b_step + k * kPanel;
        for (int64_t t = t0; t < t1; ++t) {
          const int rows = tiles.size(t);
          const int64_t m0 = m_begin + tiles.begin(t);
          const float* a = packed_a + (tiles.begin(t) - block) * depth;
          const MicroFn micro = micro_for(rows, panels);
          if (full && (is_store_as_is<Epilogue>::value || !last))
            micro(depth, a, rows, b, g.b_step, g.row(m0) + p * g.c_step, g.ldc, add);
          else
            gemm_edge_tile(g, m0, rows, p, panels, micro, depth, a, b, add, last, epilogue);
        }
        p += panels;
      }
      k += depth;
    } while (k < g.K);
  }
}

// body(m_begin, m_end, p_begin, p_end, packed_a) for blocks that cover M rows and the panels of N
// columns, on up to num_threads threads; packed_a is what gemm_block wants.
template <class Body>
void for_gemm_blocks(int num_threads, int64_t M, int64_t N, int64_t K, const Body& body) {
  if (M <= 0 || N <= 0) return;
  const int64_t panels = panels_of(N), work = M * N * (K > 0 ? K : 1);
  // Below half a million multiply-adds (4 us at 16 lanes) a second thread costs more than it
  // brings.
  const int threads = work < 500000 ? 1 : num_threads;
  const int64_t block_rows = kTilesPerBlock * kMaxRows;
  int64_t row_blocks = (M + block_rows - 1) / block_rows, column_blocks = 1;
  if (threads > 1) {
    // Each block packs its rows of A anew: a fifth of the time of a product with 4 panels.
    const int64_t most = panels / 4 > threads ? panels / 4 : threads;
    column_blocks = (4 * threads + row_blocks - 1) / row_blocks;
    if (column_blocks > most) column_blocks = most;
    if (column_blocks > panels) column_blocks = panels;
  }
  const Scratch packed_a(sizeof(float) * kPackedA * static_cast<size_t>(threads));
  std::atomic<int64_t> next{0};
  parallel_region(threads, [&](int thread, int) {
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= row_blocks * column_blocks) return;
      const int64_t i = item % row_blocks, j = item / row_blocks;
      body(i * M / row_blocks, (i + 1) * M / row_blocks, j * panels / column_blocks,
           (j + 1) * panels / column_blocks, packed_a.as<float>() + thread * kPackedA);
    }
  });
}

// The whole of C on up to num_threads threads.
template <class Epilogue = StoreAsIs>
void gemm(int num_threads, const GemmOperands& g, const Epilogue& epilogue = Epilogue()) {
  for_gemm_blocks(num_threads, g.M, g.N, g.K,
                  [&](int64_t m0, int64_t m1, int64_t p0, int64_t p1, float* packed_a) {
                    gemm_block(g, m0, m1, p0, p1, packed_a, epilogue);
                  });
}

}  // namespace mbm::MBM_ISA
