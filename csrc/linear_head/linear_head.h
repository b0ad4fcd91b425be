// Rows through a linear head and back, a chunk of rows at a time: logits = X W^T + b, what a loss
// makes of them, then grad_X = G W and grad_W = G^T X, with [N, V] never in memory.
//
// Logits and their gradients G are kept transposed, in panels of kPanel rows: class v, row r of a
// chunk at panel r / kPanel, [V, kPanel]. So sums over classes run down the lanes, without a
// horizontal step, and G is a packed operand of the GEMM for grad_X as it stands. W is packed block
// by block on the way: nothing of the size of W is made beside grad_W.
#pragma once

#include <atomic>
#include <cstring>
#include <vector>

#include "common/gemm.h"

namespace mbm::MBM_ISA {

// body(thread, item) for every item, handed out in turn: results must not depend on the thread.
template <class Body>
inline void for_items(int num_threads, int64_t items, const Body& body) {
  const int team = items < num_threads ? static_cast<int>(items) : num_threads;
  std::atomic<int64_t> next{0};
  parallel_region(team, [&](int thread, int) {
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= items) return;
      body(thread, item);
    }
  });
}

// Classes of one work item: as many as one packed block of the GEMM's A holds.
constexpr int64_t kBlockClasses = kTilesPerBlock * kMaxRows;

struct ClassBlocks {
  int64_t V, count;
  explicit ClassBlocks(int64_t classes)
      : V(classes), count((classes + kBlockClasses - 1) / kBlockClasses) {
    // Few blocks come in fours, so that 2 or 4 threads have the same to do: three of them at V 256
    // made 2 threads 1.3 times as slow. Two register tiles each at least.
    const int64_t fours = (count + 3) / 4 * 4, most = V / (2 * kMaxRows);
    if (count < 16 && count < most) count = fours < most ? fours : most;
  }
  int64_t begin(int64_t block) const { return block * V / count; }
  int64_t end(int64_t block) const { return (block + 1) * V / count; }
};

// Class v, row r at data + r / kPanel * step + v * kPanel + r % kPanel.
struct RowPanels {
  float* data;
  int64_t step;
  float* at(int64_t panel, int64_t v) const { return data + panel * step + v * kPanel; }
  float& operator()(int64_t v, int64_t r) const { return at(r / kPanel, v)[r % kPanel]; }
};

// Logits of a chunk where their gradients are made, and packed rows where only losses are: with 8
// MB at V 10000 a chunk has 192 rows, and all working memory is a sixth of what compiled stock
// takes beside the gradients; 256 rows were 1 % faster at a quarter.
constexpr int64_t kChunkBytes = int64_t{8000000};
constexpr int64_t kForwardBytes = int64_t{2} << 20;
// Of a row in a forward pass: itself and its logits of a block for a few threads.
inline int64_t forward_bytes_a_row(int64_t H) {
  return static_cast<int64_t>(sizeof(float)) * (H + 4 * kBlockClasses);
}

// Whether an index that came as data is one of the classes [begin, end). Nobody has looked at the
// values that come from a compiled graph, a dispatch mode or a tensor subclass: what is no class of
// [0, V) makes its row NaN and is no address.
inline bool is_class(int64_t index, int64_t begin, int64_t end) {
  return index >= begin && index < end;
}

inline std::vector<int64_t> kept_rows(const int64_t* target, int64_t N, int64_t ignore_index) {
  std::vector<int64_t> kept;
  for (int64_t n = 0; n < N; ++n)
    if (target[n] != ignore_index) kept.push_back(n);
  return kept;
}

// The rows that count, cut into chunks of whole panels.
struct RowChunks {
  const int64_t* kept;  // [count] indices of rows
  int64_t count, panels, chunks;

  // At most `bytes_a_row` times rows bytes in a chunk, but one panel at least.
  RowChunks(const int64_t* kept, int64_t count, int64_t bytes, int64_t bytes_a_row)
      : kept(kept), count(count), panels(panels_of(count)) {
    int64_t most = bytes / (bytes_a_row > 0 ? bytes_a_row : 1) / kPanel;
    if (most < 1) most = 1;
    chunks = (panels + most - 1) / most;
  }
  int64_t most_panels() const { return chunks > 0 ? (panels + chunks - 1) / chunks : 0; }
  int64_t first_panel(int64_t chunk) const { return chunk * panels / chunks; }
};

struct RowChunk {
  const int64_t* kept;  // [rows]
  int64_t first, rows, panels;
  RowChunk(const RowChunks& all, int64_t chunk) {
    const int64_t p0 = all.first_panel(chunk), p1 = all.first_panel(chunk + 1);
    first = p0 * kPanel;
    rows = (p1 * kPanel < all.count ? p1 * kPanel : all.count) - first;
    panels = p1 - p0;
    kept = all.kept + first;
  }
  int64_t rows_of_panel(int64_t p) const {
    return rows - p * kPanel < kPanel ? rows - p * kPanel : kPanel;
  }
};

struct LinearHead {
  int64_t V, H;
  const float* hidden;  // [N, H] contiguous
  const float* weight;  // [V, H] contiguous
  const float* bias;    // [V] or null
};

// What the calls of one pass share: an A buffer for each thread.
struct HeadThreads {
  int count;
  Scratch packed_a;
  explicit HeadThreads(int threads)
      : count(threads), packed_a(sizeof(float) * kPackedA * static_cast<size_t>(threads)) {}
  float* a(int thread) const { return packed_a.as<float>() + thread * kPackedA; }
};

// One head's side of a chunk.
class HeadChunk {
 public:
  // keep: all logits of a chunk stay; otherwise a thread has those of its block only.
  HeadChunk(const LinearHead& head, const RowChunks& rows, const HeadThreads& threads, bool keep,
            bool gradients)
      : head_(head),
        blocks_(head.V),
        threads_(threads),
        keep_(keep),
        columns_(bytes(rows.most_panels() * kPanel * head.H)),
        rows_(bytes(gradients ? panels_of(head.H) * kPanel * rows.most_panels() * kPanel : 0)),
        z_(bytes(rows.most_panels() * kPanel * (keep ? head.V : kBlockClasses * threads.count))),
        most_panels_(rows.most_panels()) {}

  // Packs the rows of a chunk; with `gradients`, also as the other operand.
  void load_rows(const RowChunk& chunk, bool gradients) {
    panels_ = chunk.panels;
    count_ = chunk.rows;
    at_.resize(static_cast<size_t>(count_));
    for (int64_t r = 0; r < count_; ++r)
      at_[static_cast<size_t>(r)] = head_.hidden + chunk.kept[r] * head_.H;
    const Rows rows{nullptr, 0, at_.data()};
    pack_b(threads_.count, rows, true, count_, head_.H, columns_.as<float>());
    if (gradients) pack_b(threads_.count, rows, false, head_.H, count_, rows_.as<float>());
  }

  // Where the classes from blocks().begin(block) on lie.
  RowPanels block(int thread, int64_t block) const {
    float* z = z_.as<float>();
    if (keep_) return {z + blocks_.begin(block) * kPanel, head_.V * kPanel};
    return {z + thread * most_panels_ * kPanel * kBlockClasses, kBlockClasses * kPanel};
  }
  RowPanels whole() const { return {z_.as<float>(), head_.V * kPanel}; }
  const ClassBlocks& blocks() const { return blocks_; }

  // The block's logits, bias included.
  RowPanels logits(int thread, int64_t block_index) const {
    const int64_t v0 = blocks_.begin(block_index), classes = blocks_.end(block_index) - v0;
    const RowPanels z = block(thread, block_index);
    GemmOperands g{};
    g.M = classes;
    g.N = panels_ * kPanel;
    g.K = head_.H;
    g.a = Rows{head_.weight + v0 * head_.H, head_.H};
    g.b = columns_.as<float>();
    g.b_step = head_.H * kPanel;
    g.c = z.data;
    g.ldc = kPanel;
    g.c_step = z.step;
    gemm_block(g, 0, g.M, 0, panels_, threads_.a(thread));
    if (head_.bias)
      for (int64_t p = 0; p < panels_; ++p)
        for (int64_t v = 0; v < classes; ++v) {
          float* at = z.at(p, v);
          const vf b = set1(head_.bias[v0 + v]);
          store(at, load(at) + b);
          store(at + kLanes, load(at + kLanes) + b);
        }
    return z;
  }

  // grad_bias[v] (+)= sum over the chunk's rows of the block's gradient.
  void grad_bias(int64_t block_index, RowPanels g, float* out, bool add) const {
    const int64_t v0 = blocks_.begin(block_index), classes = blocks_.end(block_index) - v0;
    for (int64_t v = 0; v < classes; ++v) {
      vf total = zero();
      for (int64_t r = 0; r < count_; r += kLanes)
        total = total + load_part(g.at(r / kPanel, v) + r % kPanel, count_ - r);
      const float s = sum(total);
      out[v0 + v] = add ? out[v0 + v] + s : s;
    }
  }

  // grad_weight[v, :] (+)= sum over the chunk's rows of gradient times row.
  void grad_weight(int thread, int64_t block_index, RowPanels gradient, float* out,
                   bool add) const {
    const int64_t v0 = blocks_.begin(block_index);
    GemmOperands g{};
    g.M = blocks_.end(block_index) - v0;
    g.N = head_.H;
    g.K = count_;
    g.a = Rows{gradient.data, kPanel};
    g.a_fold = gradient.step;
    g.b = rows_.as<float>();
    g.b_step = count_ * kPanel;
    g.c = out + v0 * head_.H;
    g.ldc = head_.H;
    g.accumulate = add;
    gemm_block(g, 0, g.M, 0, panels_of(head_.H), threads_.a(thread));
  }

  // grad_hidden[n, :] of the chunk's rows, from the gradients of all classes. The packed rows are
  // overwritten by its transpose.
  void grad_hidden(const RowChunk& chunk, float* out) const {
    const int64_t H = head_.H, pieces = pieces_of(H);
    const RowPanels transposed{columns_.as<float>(), H * kPanel};
    GemmOperands g{};
    g.M = H;
    g.N = panels_ * kPanel;
    g.K = head_.V;
    g.a = Rows{head_.weight, H};
    g.a_transposed = true;
    g.b = z_.as<float>();
    g.b_step = head_.V * kPanel;
    g.c = transposed.data;
    g.ldc = kPanel;
    g.c_step = transposed.step;
    for_items(threads_.count, pieces, [&](int thread, int64_t i) {
      gemm_block(g, i * H / pieces, (i + 1) * H / pieces, 0, panels_, threads_.a(thread));
    });
    for_items(threads_.count, panels_, [&](int, int64_t p) {
      for (int64_t i = 0; i < chunk.rows_of_panel(p); ++i) {
        float* row = out + chunk.kept[p * kPanel + i] * H;
        const float* column = transposed.at(p, 0) + i;
        for (int64_t h = 0; h < H; ++h) row[h] = column[h * kPanel];
      }
    });
  }

 private:
  static size_t bytes(int64_t floats) { return sizeof(float) * static_cast<size_t>(floats); }
  // Pieces of the GEMM's rows, as many for each thread: no result depends on the cut.
  int64_t pieces_of(int64_t rows) const {
    const int64_t most = threads_.count * kBlockClasses;
    const int64_t pieces = threads_.count * ((rows + most - 1) / most);
    return pieces < rows ? pieces : rows;
  }

  LinearHead head_;
  ClassBlocks blocks_;
  const HeadThreads& threads_;
  bool keep_;
  Scratch columns_;  // the rows as columns of B, [panels, H, kPanel]; then grad_hidden's transpose
  Scratch rows_;     // the rows as rows of B, [H / kPanel, rows, kPanel]
  Scratch z_;
  int64_t most_panels_, panels_ = 0, count_ = 0;
  std::vector<const float*> at_;
};

}  // namespace mbm::MBM_ISA
