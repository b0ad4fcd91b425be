// Forward: x W_ih^T for a few steps at a time, then step by step h W_hh^T with the gates applied to
// each tile while it is in L1. h W_hh^T is never stored.
#include "gru/gru_gates.h"
#include "gru/gru_pack.h"
#include "gru/gru_plan.h"

namespace mbm::MBM_ISA {
namespace {

// Rows of x projected at once: 128 read W_ih from L3 once per 128 cycles of multiply-adds a line.
constexpr int64_t kProjectedRows = 128;

struct BiasEpilogue {
  const float* bias;
  vf operator()(vf sum, int64_t, int64_t n) const { return sum + load(bias + n); }
};

class Forward {
 public:
  Forward(const GruForward& args, int num_threads, int)
      : args_(args),
        seq_(args.sequence),
        w_(args.packed, seq_.C, seq_.H),
        schedule_(seq_.T, seq_.B, seq_.lengths),
        work_(3 * seq_.H * schedule_.rows * (seq_.C + seq_.H)),
        threads_(threads_for(num_threads, work_, seq_.T, seq_.B, seq_.H)),
        chunk_(chunk_steps()),
        barriers_(threads_),
        h_(floats(seq_.B * w_.padded)),
        packed_h_(floats(2 * seq_.B * seq_.H)),
        projected_(floats(chunk_ * seq_.B * 3 * w_.padded)),
        x_rows_(sizeof(const float*) * static_cast<size_t>(chunk_ * seq_.B * threads_)),
        packed_x_(floats(kPackedA * threads_)) {}

  int threads() const { return threads_; }
  int64_t work() const { return work_; }

  void run_share(int thread, int team) {
    const Grid grid = thread_grid(team, seq_.B, seq_.H);
    const Share share(thread, grid, seq_.B, seq_.H);
    if (share.idle) return;
    const bool shared = grid.units > 1;
    // Even and odd steps read one and write the other.
    float* packed_h[2] = {packed_h_.as<float>() + share.rows_before * seq_.H,
                          packed_h_.as<float>() + (seq_.B + share.rows_before) * seq_.H};
    load_h0(share, packed_h);
    if (shared) barriers_[share.group].wait(grid.units);
    const float* gx = nullptr;
    for (int64_t s = 0; s < seq_.T; ++s) {
      if (s % chunk_ == 0) gx = project(share, thread, s);
      gx = step(share, s, gx, packed_h[s % 2], packed_h[(s + 1) % 2]);
      if (shared) barriers_[share.group].wait(grid.units);
    }
    store_h_n(share);
    if (thread % grid.units == 0) clear_padding(share);
  }

  void finish() const {}

 private:
  static size_t floats(int64_t n) { return sizeof(float) * static_cast<size_t>(n); }

  int64_t chunk_steps() const {
    const int64_t rows = seq_.B > 0 ? (seq_.B + threads_ - 1) / threads_ : 1;
    const int64_t steps = (kProjectedRows + rows - 1) / rows;
    return steps < seq_.T ? steps : seq_.T;
  }

  int64_t time(int64_t s) const { return seq_.reverse ? seq_.T - 1 - s : s; }
  float* h_row(const Share& share, int64_t row) const {
    return h_.as<float>() + (share.rows_before + row) * w_.padded;
  }
  float* y_row(int64_t t, int64_t rank) const {
    return args_.y + (t * seq_.B + schedule_.order[rank]) * args_.y_stride;
  }
  int64_t unit_end(const Share& share) const {
    const int64_t end = share.block_end * kPanel;
    return end < seq_.H ? end : seq_.H;
  }

  void pack_h(const Share& share, const RowTiles& tiles, int64_t tile, int64_t u0, int64_t u1,
              float* packed_h) const {
    const int64_t row = tiles.begin(tile);
    const int size = tiles.size(tile);
    transpose_rows(Rows{h_row(share, row), w_.padded}, 0, size, u0, u1 - u0,
                   packed_h + row * seq_.H + u0 * size, size);
  }

  void load_h0(const Share& share, float* const* packed_h) const {
    const int64_t u0 = share.block_begin * kPanel, u1 = unit_end(share);
    for (int64_t row = 0; row < share.rows; ++row) {
      float* h = h_row(share, row);
      const float* h0 = seq_.h0 ? seq_.h0 + schedule_.order[share.rank(row)] * seq_.H : nullptr;
      for (int64_t u = u0; u < u1; ++u) h[u] = h0 ? h0[u] : 0.0f;
      for (int64_t u = u1; u < share.block_end * kPanel; ++u) h[u] = 0.0f;
    }
    const RowTiles tiles(share.rows);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile)
      for (int i = 0; i < 2; ++i) pack_h(share, tiles, tile, u0, u1, packed_h[i]);
  }

  int64_t projected_width(const Share& share) const {
    return 3 * (share.block_end - share.block_begin) * kPanel;
  }

  // x W_ih^T + bias for the active rows of chunk_ steps from s on, in the order in which they run:
  // [rows, blocks of the share, 3, kPanel].
  const float* project(const Share& share, int thread, int64_t s) {
    const int64_t last = s + chunk_ < seq_.T ? s + chunk_ : seq_.T;
    const float** rows = x_rows_.as<const float*>() + thread * chunk_ * seq_.B;
    int64_t count = 0;
    for (int64_t i = s; i < last; ++i) {
      const int64_t t = time(i), n = share.rows_of(schedule_.active[t]);
      for (int64_t row = 0; row < n; ++row)
        rows[count++] =
            seq_.x + t * seq_.x_stride_t + schedule_.order[share.rank(row)] * seq_.x_stride_b;
    }
    const int64_t width = projected_width(share), panel = 3 * share.block_begin;
    GemmOperands g{};
    g.M = count, g.N = width, g.K = seq_.C;
    g.a = Rows{nullptr, 0, rows};
    g.b = w_.w_ih + panel * seq_.C * kPanel, g.b_step = seq_.C * kPanel;
    g.c = projected_.as<float>() +
          chunk_ * 3 * (share.rows_before * w_.padded + share.rows * share.block_begin * kPanel);
    g.ldc = width;
    gemm_block(g, 0, count, 0, width / kPanel, packed_x_.as<float>() + thread * kPackedA,
               BiasEpilogue{w_.bias + panel * kPanel});
    return g.c;
  }

  // Returns the projected rows of the next step.
  const float* step(const Share& share, int64_t s, const float* projected, const float* packed_h,
                    float* packed_next) {
    const int64_t t = time(s), n = share.rows_of(schedule_.active[t]);
    const int64_t H = seq_.H, width = projected_width(share);
    const RowTiles tiles(share.rows);
    alignas(64) float tile_c[kMaxRows * 3 * kPanel];
    const Zigzag blocks{share.block_begin, share.block_end, s};
    for (int64_t i = 0; i < blocks.count(); ++i) {
      const int64_t block = blocks[i], u0 = block * kPanel, u1 = u0 + kPanel < H ? u0 + kPanel : H;
      const float* gx = projected + 3 * (block - share.block_begin) * kPanel;
      for (int64_t tile = 0; tile < tiles.tiles && tiles.begin(tile) < n; ++tile) {
        const int64_t row0 = tiles.begin(tile);
        const int size = tiles.size(tile);
        const int rows = n - row0 < size ? static_cast<int>(n - row0) : size;
        micro_rows(rows, 3, H, packed_h + row0 * H, size, w_.w_hh + 3 * block * H * kPanel,
                   H * kPanel, tile_c, 3 * kPanel, false);
        for (int i = 0; i < rows; ++i) {
          const int64_t rank = share.rank(row0 + i);
          float* y = args_.y ? y_row(t, rank) : nullptr;
          float* saved =
              args_.reserve ? args_.reserve + (schedule_.first[t] + rank) * 4 * H : nullptr;
          gates(gx + (row0 + i) * width, tile_c + i * 3 * kPanel, h_row(share, row0 + i), y, saved,
                u0, u1);
        }
        pack_h(share, tiles, tile, u0, u1, packed_next);
      }
    }
    return projected + n * width;
  }

  // gx and c [3, kPanel] of one row and unit block; h, y [H] and saved [4H] of the row.
  void gates(const float* gx, const float* c, float* h, float* y, float* saved, int64_t u0,
             int64_t u1) const {
    const int64_t H = seq_.H;
    for (int64_t u = u0; u < u1; u += kLanes) {
      const int64_t j = u - u0, left = u1 - u;
      const vf hn = load(c + 2 * kPanel + j) + load(w_.bias_hn + u);
      const GruGates g = gru_gates(load(gx + j), load(c + j), load(gx + kPanel + j),
                                   load(c + kPanel + j), load(gx + 2 * kPanel + j), hn);
      const vf next = g.next(load(h + u));
      store(h + u, next);
      if (y) store_part(y + u, next, left);
      if (saved) store_gates(saved + u, H, g, hn, left);
    }
  }

  void store_h_n(const Share& share) const {
    for (int64_t row = 0; row < share.rows; ++row) {
      const float* h = h_row(share, row);
      float* out = args_.h_n + schedule_.order[share.rank(row)] * seq_.H;
      for (int64_t u = share.block_begin * kPanel; u < unit_end(share); ++u) out[u] = h[u];
    }
  }

  void clear_padding(const Share& share) const {
    if (!args_.y || !seq_.lengths) return;
    for (int64_t t = 0; t < seq_.T; ++t)
      for (int64_t row = share.rows_of(schedule_.active[t]); row < share.rows; ++row)
        clear_row(y_row(t, share.rank(row)), seq_.H);
  }

  const GruForward& args_;
  const GruSequence& seq_;
  const GruPackedParts<const float> w_;
  const Schedule schedule_;
  const int64_t work_;
  const int threads_;
  const int64_t chunk_;
  const Barriers barriers_;
  const Scratch h_;          // [B, padded], rows of a group together
  const Scratch packed_h_;   // two of [B, H]: A tiles of each group's rows
  const Scratch projected_;  // [chunk_ * B, 3 * padded], cut by share
  const Scratch x_rows_;     // [threads_, chunk_ * B]
  const Scratch packed_x_;   // [threads_, kPackedA]
};

}  // namespace

void gru_forward(const GruForward* directions, int count, int num_threads) {
  run_directions<Forward>(directions, count, num_threads);
}

}  // namespace mbm::MBM_ISA
