// The product in chunks of columns by tiles of rows; each tile's logits are reduced in L1 to k
// candidates, a maximum and a sum for each row, and these are merged in the order of the chunks.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/gemm_pack.h"
#include "linear_head/row_statistics.h"
#include "linear_topk/linear_topk.h"

namespace mbm::MBM_ISA {
namespace {

// Of one piece of work: 14 rows of logits are 14 KiB, their part of the weight 320 KiB at H = 320.
constexpr int64_t kChunkColumns = 256;
// Rows packed at once: 4 MiB at H = 1024.
constexpr int64_t kMostRows = 1024;
// Tiles of one piece: the part of the weight comes from L2 for all but the first.
constexpr int64_t kTilesOfPiece = 8;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline bool comes_before(float a, float b) { return a > b || (a != a && b == b); }

// Sorted candidates of one row, -1 for a class where there are fewer than k.
struct Best {
  int64_t k;
  float* values;  // [k]
  int32_t* ids;   // [k]

  void clear() const { std::fill_n(ids, k, -1); }
  // Classes must come in ascending order.
  void insert(float value, int32_t id) const {
    int64_t i = k - 1;
    if (ids[i] >= 0 && !comes_before(value, values[i])) return;
    while (i > 0 && (ids[i - 1] < 0 || comes_before(value, values[i - 1]))) {
      values[i] = values[i - 1];
      ids[i] = ids[i - 1];
      --i;
    }
    values[i] = value;
    ids[i] = id;
  }
};

// The k-th largest of the lanes: at least k elements are not below it. -inf if there are fewer.
float kth_lane(vf most, int64_t k) {
  if (k == 1) return max_lane(most);
  if (k > kLanes) return -kInfinity;
  alignas(64) float lanes[kLanes];
  store(lanes, most);
  for (int64_t i = 0; i < k - 1; ++i) *std::max_element(lanes, lanes + kLanes) = -kInfinity;
  return *std::max_element(lanes, lanes + kLanes);
}

class TopkRows {
 public:
  TopkRows(const LinearTopk& args, int64_t r0, int64_t rows, int threads)
      : args_(args),
        r0_(r0),
        rows_(rows),
        tiles_(rows),
        panels_(panels_of(args.V)),
        chunks_((panels_ * kPanel + kChunkColumns - 1) / kChunkColumns),
        packed_(bytes(rows * args.H)),
        logits_(bytes(kMaxRows * kChunkColumns * threads)),
        maxima_(bytes(rows * chunks_)),
        sums_(bytes(rows * chunks_)),
        values_(bytes(rows * chunks_ * args.k)),
        ids_(bytes(rows * chunks_ * args.k)) {}

  int64_t tiles() const { return tiles_.tiles; }
  int64_t pieces() const { return chunks_ * row_blocks(); }

  void pack(int64_t tile) const {
    const Rows rows{args_.hidden + r0_ * args_.hidden_stride, args_.hidden_stride};
    const int64_t begin = tiles_.begin(tile);
    const int size = tiles_.size(tile);
    transpose_rows(rows, begin, size, 0, args_.H, packed_.as<float>() + begin * args_.H, size);
  }

  void reduce(int thread, int64_t piece) const {
    const int64_t block = piece % row_blocks(), chunk = piece / row_blocks();
    const int64_t p0 = chunk * panels_ / chunks_, p1 = (chunk + 1) * panels_ / chunks_;
    const int64_t c0 = p0 * kPanel, columns = std::min(args_.V, p1 * kPanel) - c0;
    const int64_t ld = (p1 - p0) * kPanel;
    float* z = logits_.as<float>() + thread * kMaxRows * kChunkColumns;
    const int64_t end = (block + 1) * tiles_.tiles / row_blocks();
    for (int64_t tile = block * tiles_.tiles / row_blocks(); tile < end; ++tile) {
      const int size = tiles_.size(tile);
      const int64_t begin = tiles_.begin(tile);
      micro_rows(size, p1 - p0, args_.H, packed_.as<float>() + begin * args_.H, size,
                 args_.packed + p0 * args_.H * kPanel, args_.H * kPanel, z, ld, false);
      for (int i = 0; i < size; ++i) reduce_row(z + i * ld, c0, columns, begin + i, chunk);
    }
  }

  // Row r from all chunks.
  void merge(int64_t r) const {
    const float* maxima = maxima_.as<float>() + r * chunks_;
    const float* sums = sums_.as<float>() + r * chunks_;
    float most = maxima[0];
    for (int64_t c = 1; c < chunks_; ++c) most = std::max(most, maxima[c]);
    vf total = zero();
    for (int64_t c = 0; c < chunks_; c += kLanes) {
      const int64_t left = chunks_ - c;
      const vf shift = exp_or_zero(load_part(maxima + c, left) - set1(most));
      total = fma(load_part(sums + c, left), shift, total);
    }
    const float log_total = std::log(sum(total));
    float values[kMostTopk];
    int32_t ids[kMostTopk];
    const Best best{args_.k, values, ids};
    best.clear();
    for (int64_t c = 0; c < chunks_; ++c) {
      const Best from = best_of(r, c);
      for (int64_t i = 0; i < args_.k && from.ids[i] >= 0; ++i)
        best.insert(from.values[i], from.ids[i]);
    }
    const int64_t at = (r0_ + r) * args_.k;
    for (int64_t i = 0; i < args_.k; ++i) {
      args_.values[at + i] = (values[i] - most) - log_total;
      args_.ids[at + i] = ids[i];
    }
  }

 private:
  static size_t bytes(int64_t floats) { return sizeof(float) * static_cast<size_t>(floats); }
  int64_t row_blocks() const { return (tiles_.tiles + kTilesOfPiece - 1) / kTilesOfPiece; }
  Best best_of(int64_t r, int64_t chunk) const {
    const int64_t at = (r * chunks_ + chunk) * args_.k;
    return {args_.k, values_.as<float>() + at, ids_.as<int32_t>() + at};
  }

  // Logits z of `columns` classes from c0 on, of which whole vectors may be written.
  void reduce_row(float* z, int64_t c0, int64_t columns, int64_t r, int64_t chunk) const {
    for (int64_t c = columns; c % kLanes != 0; ++c) z[c] = -kInfinity;
    vf lanes = set1(-kInfinity);
    for (int64_t c = 0; c < columns; c += kLanes) {
      vf x = load(z + c);
      if (args_.bias) {
        x = x + load_part(args_.bias + c0 + c, columns - c);
        store(z + c, x);
      }
      lanes = max(x, lanes);  // without NaN
    }
    const float most = std::max(max_lane(lanes), kNoLogit);
    const vf least = set1(kth_lane(lanes, args_.k));
    const Best best = best_of(r, chunk);
    best.clear();
    vf total = zero();
    for (int64_t c = 0; c < columns; c += kLanes) {
      const vf x = load(z + c);
      total = total + exp_or_zero(x - set1(most));
      for (uint32_t found = not_below(x, least); found != 0; found &= found - 1) {
        const int64_t at = c + __builtin_ctz(found);
        if (at < columns) best.insert(z[at], static_cast<int32_t>(c0 + at));
      }
    }
    maxima_.as<float>()[r * chunks_ + chunk] = most;
    sums_.as<float>()[r * chunks_ + chunk] = sum(total);
  }

  const LinearTopk& args_;
  int64_t r0_, rows_;
  RowTiles tiles_;
  int64_t panels_, chunks_;
  Scratch packed_;         // tiles of [H, rows of the tile]
  Scratch logits_;         // of each thread, a tile of rows by a chunk
  Scratch maxima_, sums_;  // [rows, chunks]
  Scratch values_, ids_;   // [rows, chunks, k]
};

}  // namespace

void linear_topk(const LinearTopk& args, int num_threads) {
  // As for_gemm_blocks: below half a million multiply-adds a second thread costs more.
  const int threads = args.R * args.V * std::max<int64_t>(args.H, 1) < 500000 ? 1 : num_threads;
  for (int64_t r0 = 0; r0 < args.R; r0 += kMostRows) {
    const int64_t rows = std::min(kMostRows, args.R - r0);
    const TopkRows work(args, r0, rows, threads);
    std::atomic<int64_t> next_tile{0}, next_piece{0}, next_row{0};
    Barrier packed, reduced;
    parallel_region(threads, [&](int thread, int team) {
      const auto take = [](std::atomic<int64_t>& next) {
        return next.fetch_add(1, std::memory_order_relaxed);
      };
      for (int64_t i; (i = take(next_tile)) < work.tiles();) work.pack(i);
      if (team > 1) packed.wait(team);
      for (int64_t i; (i = take(next_piece)) < work.pieces();) work.reduce(thread, i);
      if (team > 1) reduced.wait(team);
      for (int64_t i; (i = take(next_row)) < rows;) work.merge(i);
    });
  }
}

}  // namespace mbm::MBM_ISA
