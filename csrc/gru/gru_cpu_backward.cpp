// Backward: a loop over the steps with only pointwise work and grad_h = grad_gates W_hh, then one
// product a weight over all steps at once.
#include "gru/gru_gates.h"
#include "gru/gru_plan.h"

namespace mbm::MBM_ISA {
namespace {

class Backward {
 public:
  // num_threads for the steps; products_threads for what follows them.
  Backward(const GruBackward& args, int num_threads, int products_threads)
      : args_(args),
        seq_(args.sequence),
        padded_(panels_of(seq_.H) * kPanel),
        schedule_(seq_.T, seq_.B, seq_.lengths),
        work_(3 * seq_.H * schedule_.rows * seq_.H),
        num_threads_(products_threads),
        threads_(threads_for(num_threads, work_, seq_.T, seq_.B, seq_.H)),
        barriers_(threads_),
        grad_h_(floats(seq_.B * padded_)),
        grad_gates_(floats(schedule_.rows * 4 * seq_.H)),
        packed_(floats(2 * seq_.B * 3 * seq_.H)),
        zeros_(floats(seq_.H)) {
    clear_row(zeros_.as<float>(), seq_.H);
  }

  int threads() const { return threads_; }
  int64_t work() const { return work_; }

  void run_share(int thread, int team) {
    const Grid grid = thread_grid(team, seq_.B, seq_.H);
    const Share share(thread, grid, seq_.B, seq_.H);
    if (share.idle) return;
    load_grad_h_n(share);
    const int64_t K = 3 * seq_.H;
    float* packed[2] = {packed_.as<float>() + share.rows_before * K,
                        packed_.as<float>() + (seq_.B + share.rows_before) * K};
    for (int64_t s = 0; s < seq_.T; ++s) {
      const int64_t t = seq_.reverse ? s : seq_.T - 1 - s;
      pointwise(share, t, packed[s % 2]);
      if (grid.units > 1) barriers_[share.group].wait(grid.units);
      if (s + 1 < seq_.T || args_.grad_h0) through_weights(share, s, t, packed[s % 2]);
    }
    if (args_.grad_h0) store_grad_h0(share);
  }

  void finish() const {
    grad_weights();
    grad_input();
    grad_biases();
  }

 private:
  static size_t floats(int64_t n) { return sizeof(float) * static_cast<size_t>(n); }

  float* grad_h_row(const Share& share, int64_t row) const {
    return grad_h_.as<float>() + (share.rows_before + row) * padded_;
  }
  int64_t unit_end(const Share& share) const {
    const int64_t end = share.block_end * kPanel;
    return end < seq_.H ? end : seq_.H;
  }

  void load_grad_h_n(const Share& share) const {
    for (int64_t row = 0; row < share.rows; ++row) {
      float* grad_h = grad_h_row(share, row);
      const float* from = args_.grad_h_n
                              ? args_.grad_h_n + schedule_.order[share.rank(row)] * seq_.H
                              : zeros_.as<float>();
      for (int64_t u = share.block_begin * kPanel; u < share.block_end * kPanel; ++u)
        grad_h[u] = u < seq_.H ? from[u] : 0.0f;
    }
  }

  void store_grad_h0(const Share& share) const {
    for (int64_t row = 0; row < share.rows; ++row) {
      float* out = args_.grad_h0 + schedule_.order[share.rank(row)] * seq_.H;
      for (int64_t u = share.block_begin * kPanel; u < unit_end(share); ++u)
        out[u] = grad_h_row(share, row)[u];
    }
  }

  // The state before step t of a rank that has this step.
  const float* previous_h(int64_t t, int64_t rank) const {
    const int64_t b = schedule_.order[rank], H = seq_.H;
    const bool from_h0 = seq_.reverse ? t + 1 == seq_.T || rank >= schedule_.active[t + 1] : t == 0;
    if (from_h0) return seq_.h0 ? seq_.h0 + b * H : zeros_.as<float>();
    return args_.y + ((seq_.reverse ? t + 1 : t - 1) * seq_.B + b) * args_.y_stride;
  }

  float* gates_row(int64_t t, int64_t rank) const {
    return grad_gates_.as<float>() + (schedule_.first[t] + rank) * 4 * seq_.H;
  }

  // Gate gradients of step t into grad_gates_ and, as A tiles [3H, rows], into `packed`; what of
  // grad_h passes by the gates stays in grad_h_.
  void pointwise(const Share& share, int64_t t, float* packed) const {
    const int64_t n = share.rows_of(schedule_.active[t]), H = seq_.H;
    const RowTiles tiles(share.rows);
    for (int64_t row = 0; row < n; ++row) {
      const int64_t rank = share.rank(row);
      const float* grad_y = args_.grad_y ? args_.grad_y + t * args_.grad_y_stride_t +
                                               schedule_.order[rank] * args_.grad_y_stride_b
                                         : nullptr;
      row_gates(args_.reserve + (schedule_.first[t] + rank) * 4 * H, previous_h(t, rank), grad_y,
                grad_h_row(share, row), gates_row(t, rank), share.block_begin * kPanel,
                unit_end(share));
    }
    const int64_t u0 = share.block_begin * kPanel, width = unit_end(share) - u0;
    for (int64_t tile = 0; tile < tiles.tiles && tiles.begin(tile) < n; ++tile) {
      const int64_t row0 = tiles.begin(tile);
      const int size = tiles.size(tile);
      const int rows = n - row0 < size ? static_cast<int>(n - row0) : size;
      const Rows gates{gates_row(t, share.rank(row0)), share.groups * 4 * H};
      for (int64_t gate = 0; gate < 3; ++gate)
        transpose_rows(gates, 0, rows, (1 + gate) * H + u0, width,
                       packed + row0 * 3 * H + (gate * H + u0) * size, size);
    }
  }

  // saved [4H] = r, z, n, hn; grad [4H] = n, r, z, hn: the first three meet W_ih, the last three
  // W_hh.
  void row_gates(const float* saved, const float* h, const float* grad_y, float* grad_h,
                 float* grad, int64_t u0, int64_t u1) const {
    const int64_t H = seq_.H;
    for (int64_t u = u0; u < u1; u += kLanes) {
      const int64_t left = u1 - u;
      vf g = load(grad_h + u);
      if (grad_y) g = g + load_part(grad_y + u, left);
      store(grad_h + u, grad_gates(saved + u, H, load_part(h + u, left), g, grad + u, left));
    }
  }

  // A lone tile takes as many panels at once as its rows leave registers for, but no more than L2
  // keeps for the next step.
  int64_t panels_together(int rows, int64_t blocks) const {
    const int64_t panel_bytes = 3 * seq_.H * kPanel * 4;
    if (blocks == 0 || panel_bytes > kKeptWeights) return 1;
    const int64_t most = kKeptWeights / panel_bytes, fit = panels_at_once(rows, blocks);
    return most < fit ? most : fit;
  }

  // grad_h += [grad_r, grad_z, grad_hn] W_hh for the rows of step t.
  void through_weights(const Share& share, int64_t s, int64_t t, const float* packed) const {
    const int64_t n = share.rows_of(schedule_.active[t]), K = 3 * seq_.H;
    const RowTiles tiles(share.rows);
    const int64_t blocks = share.block_end - share.block_begin;
    const int64_t together = tiles.tiles == 1 ? panels_together(tiles.size(0), blocks) : 1;
    const Zigzag groups{0, (blocks + together - 1) / together, s};
    for (int64_t i = 0; i < groups.count(); ++i) {
      const int64_t block = share.block_begin + groups[i] * together;
      const int64_t left = share.block_end - block, panels = left < together ? left : together;
      for (int64_t tile = 0; tile < tiles.tiles && tiles.begin(tile) < n; ++tile) {
        const int64_t row0 = tiles.begin(tile);
        const int size = tiles.size(tile);
        const int rows = n - row0 < size ? static_cast<int>(n - row0) : size;
        micro_rows(rows, panels, K, packed + row0 * K, size,
                   args_.packed_recurrent + block * K * kPanel, K * kPanel,
                   grad_h_row(share, row0) + block * kPanel, padded_, true);
      }
    }
  }

  template <class RowOf>  // RowOf(t, rank, b) -> T*
  auto row_table(const Scratch& memory, const RowOf& row_of) const {
    auto* at = memory.as<decltype(row_of(0, 0, 0))>();
    for (int64_t t = 0; t < seq_.T; ++t)
      for (int64_t rank = 0; rank < schedule_.active[t]; ++rank)
        at[schedule_.first[t] + rank] = row_of(t, rank, schedule_.order[rank]);
    return at;
  }
  size_t table_bytes() const { return sizeof(void*) * static_cast<size_t>(schedule_.rows); }

  // grad [rows, N] = (columns column .. column + rows of the gate gradients)^T B.
  void weight_product(int64_t column, int64_t rows, int64_t N, const float* b, float* grad) const {
    GemmOperands g{};
    g.M = rows, g.N = N, g.K = schedule_.rows;
    g.a = Rows{grad_gates_.as<float>() + column, 4 * seq_.H};
    g.a_transposed = true;
    g.b = b, g.b_step = g.K * kPanel;
    g.c = grad, g.ldc = N;
    gemm(num_threads_, g);
  }

  void grad_weights() const {
    const int64_t M = schedule_.rows, H = seq_.H, C = seq_.C;
    const Scratch table(table_bytes());
    if (args_.grad_w_hh) {
      const Scratch packed(floats(panels_of(H) * M * kPanel));
      const float* const* h =
          row_table(table, [&](int64_t t, int64_t rank, int64_t) { return previous_h(t, rank); });
      pack_b(num_threads_, Rows{nullptr, 0, h}, false, H, M, packed.as<float>());
      weight_product(H, 3 * H, H, packed.as<float>(), args_.grad_w_hh);
    }
    if (args_.grad_w_ih) {
      const Scratch packed(floats(panels_of(C) * M * kPanel));
      const float* const* x = row_table(table, [&](int64_t t, int64_t, int64_t b) {
        return seq_.x + t * seq_.x_stride_t + b * seq_.x_stride_b;
      });
      pack_b(num_threads_, Rows{nullptr, 0, x}, false, C, M, packed.as<float>());
      weight_product(H, 2 * H, C, packed.as<float>(), args_.grad_w_ih);
      weight_product(0, H, C, packed.as<float>(), args_.grad_w_ih + 2 * H * C);
    }
  }

  void grad_input() const {
    if (!args_.grad_x) return;
    const int64_t H = seq_.H, C = seq_.C;
    const Scratch table(table_bytes());
    GemmOperands g{};
    g.M = schedule_.rows, g.N = C, g.K = 3 * H;
    g.a = Rows{grad_gates_.as<float>(), 4 * H};
    g.b = args_.packed_input, g.b_step = g.K * kPanel;
    g.c = args_.grad_x, g.ldc = C;
    g.accumulate = args_.add_grad_x;
    if (seq_.lengths) {
      g.c_rows = row_table(table, [&](int64_t t, int64_t, int64_t b) {
        return args_.grad_x + (t * seq_.B + b) * C;
      });
      for (int64_t t = 0; t < (args_.add_grad_x ? 0 : seq_.T); ++t)
        for (int64_t rank = schedule_.active[t]; rank < seq_.B; ++rank)
          clear_row(args_.grad_x + (t * seq_.B + schedule_.order[rank]) * C, C);
    }
    gemm(num_threads_, g);
  }

  // Column sums of the gate gradients: chains over 16 rows, then a chain of those.
  void grad_biases() const {
    if (!args_.grad_b_ih && !args_.grad_b_hh) return;
    const int64_t M = schedule_.rows, H = seq_.H;
    const int threads = M * H < 65536 ? 1 : num_threads_;
    parallel_for(threads, 4 * H, 4 * kLanes, [&](int64_t begin, int64_t end) {
      for (int64_t column = begin; column < end; column += kLanes) {
        const int64_t left = end - column;
        vf total = zero();
        for (int64_t m0 = 0; m0 < M; m0 += 16) {
          const int64_t m1 = m0 + 16 < M ? m0 + 16 : M;
          const float* at = grad_gates_.as<float>() + m0 * 4 * H + column;
          vf part = zero();
          for (int64_t m = m0; m < m1; ++m, at += 4 * H) part = part + load_part(at, left);
          total = total + part;
        }
        store_bias(column, total, left < kLanes ? static_cast<int>(left) : kLanes);
      }
    });
  }

  void store_bias(int64_t column, vf sums, int count) const {
    const int64_t H = seq_.H;
    for (int j = 0; j < count; ++j) {
      const int64_t gate = (column + j) / H, u = (column + j) % H;  // n, r, z, hn
      if (args_.grad_b_ih && gate < 3) args_.grad_b_ih[(gate + 2) % 3 * H + u] = sums[j];
      if (args_.grad_b_hh && gate > 0) args_.grad_b_hh[(gate - 1) * H + u] = sums[j];
    }
  }

  const GruBackward& args_;
  const GruSequence& seq_;
  const int64_t padded_;
  const Schedule schedule_;
  const int64_t work_;
  const int num_threads_, threads_;
  const Barriers barriers_;
  const Scratch grad_h_;      // [B, padded], rows of a group together
  const Scratch grad_gates_;  // compact rows [4H] = n, r, z, hn
  const Scratch packed_;      // two of [B, 3H]: A tiles of a step's grad_r, grad_z, grad_hn
  const Scratch zeros_;       // [H]
};

}  // namespace

void gru_backward(const GruBackward* directions, int count, int num_threads) {
  run_directions<Backward>(directions, count, num_threads);
}

}  // namespace mbm::MBM_ISA
