// Convolution by Winograd's F(4x4, 3x3): blocks of tiles are transformed, multiplied and turned
// back while they are in L2.
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_winograd.h"

namespace mbm::MBM_ISA {

// Panels of kPanel output channels: [panel][point][C][kPanel], see packed_point_step.
int64_t winograd_packed_size(int64_t C, int64_t K) {
  return panels_of(K) * kPoints * packed_point_step(C);
}

void winograd_pack(const ConvWeight& weight, const float* w, float* packed, int num_threads) {
  const int64_t K = weight.transposed ? weight.C : weight.K;
  const int64_t C = weight.transposed ? weight.K : weight.C;
  parallel_for(K * C < 1024 ? 1 : num_threads, panels_of(K), 1, [&](int64_t p0, int64_t p1) {
    alignas(64) float taps[9 * kPanel] = {};
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t k = p * kPanel;
      const int count = static_cast<int>(std::min<int64_t>(kPanel, K - k));
      if (count < kPanel) std::fill(taps, taps + 9 * kPanel, 0.0f);
      for (int64_t c = 0; c < C; ++c) {
        const int64_t first = weight.transposed ? c * K + k : k * C + c;
        transpose_rows({w + first * 9, weight.transposed ? 9 : C * 9, nullptr}, 0, count, 0, 9,
                       taps, kPanel);
        for (int half = 0; half < kPanel; half += kLanes) {
          vf from[9], rows[3 * kPatch], points[kPoints];
          for (int i = 0; i < 9; ++i)
            from[i] = load(taps + (weight.transposed ? 8 - i : i) * kPanel + half);
          for (int i = 0; i < 3; ++i) weight_1d<3, 3>(from + i, rows + i);
          for (int i = 0; i < kPatch; ++i) weight_1d<1, 1>(rows + i * 3, points + i * kPatch);
          float* to = packed + p * kPoints * packed_point_step(C) + c * kPanel + half;
          for (int i = 0; i < kPoints; ++i) store(to + i * packed_point_step(C), points[i]);
        }
      }
    }
  });
}

namespace {

// Tiles turned back at a time: 16 pixels of them are 16 KiB at 16 lanes.
constexpr int64_t kRun = 16;
// V of a block; measured over 14 to 112 tiles of 64 to 512 channels.
constexpr int64_t kBlockBytes = 640 << 10;
constexpr int64_t kLeastTiles = 4 * kMaxRows;
constexpr int64_t kSumBytes = 256 << 10;  // M of the panels between two inverse transforms

int64_t blocks_of(const ConvSizes& s, int64_t count) {
  const int64_t fitting = kBlockBytes / (kPoints * 4 * s.C) / kMaxRows * kMaxRows;
  const int64_t most = std::max(fitting, kLeastTiles);
  return (count + most - 1) / most;
}

class Winograd {
 public:
  explicit Winograd(const ConvForward& args)
      : args_(args), s_(args.sizes), tiles_(s_.B, s_.conv_y, s_.conv_x) {
    for (int64_t c = 0; c < s_.C; c += kLanes)
      depths_.push_back(std::min<int64_t>(kLanes, s_.C - c));
  }

  const Tiles& tiles() const { return tiles_; }

  // Tiles [t0, t1), panels [p0, p1).
  void block(int64_t t0, int64_t t1, int64_t p0, int64_t p1) const {
    const TransformedTiles v(t1 - t0, s_.C);
    const int64_t sum_step = (t1 - t0) * kPanel + kLanes;  // between two points of M
    const int64_t group = std::max<int64_t>(1, kSumBytes / (kPoints * sum_step * 4));
    const Scratch memory(sizeof(float) *
                         (v.floats() + std::min(group, p1 - p0) * kPoints * sum_step +
                          16 * kRun * kLanes + staged_floats(kTile, kTile * kRun)));
    float* inputs = memory.as<float>();
    float* sums = inputs + v.floats();
    float* pixels = sums + std::min(group, p1 - p0) * kPoints * sum_step;
    float* staged = pixels + 16 * kRun * kLanes;
    transform_inputs(args_.x, s_.Y, s_.X, s_.top, s_.left, tiles_, t0, v, inputs);
    std::vector<Segment> segments;
    for (size_t i = 0; i < depths_.size(); ++i)
      segments.push_back({static_cast<int64_t>(i) * v.tiles * kLanes, depths_[i]});
    for (int64_t g0 = p0; g0 < p1; g0 += group) {
      const int64_t g1 = std::min(p1, g0 + group);
      multiply(v, segments, inputs, g0, g1, sum_step, sums);
      for (int64_t p = g0; p < g1; ++p)
        for (int half = 0; half < vectors_of(s_.K - p * kPanel); ++half)
          invert(t0, t1, p * kPanel + half * kLanes, sum_step,
                 sums + (p - g0) * kPoints * sum_step + half * kLanes, pixels, staged);
    }
  }

 private:
  void multiply(const TransformedTiles& v, const std::vector<Segment>& segments,
                const float* inputs, int64_t p0, int64_t p1, int64_t sum_step, float* sums) const {
    const RowTiles rows(v.tiles);
    for (int point = 0; point < kPoints; ++point)
      for (int64_t p = p0; p < p1; ++p) {
        const float* weights = args_.packed + (p * kPoints + point) * packed_point_step(s_.C);
        float* to = sums + ((p - p0) * kPoints + point) * sum_step;
        const int vectors = vectors_of(s_.K - p * kPanel);
        for (int64_t r = 0; r < rows.tiles; ++r)
          tiles_micro(rows.size(r), vectors)(segments.data(), static_cast<int64_t>(segments.size()),
                                             inputs + point * v.point_step + rows.begin(r) * kLanes,
                                             kLanes, weights, to + rows.begin(r) * kPanel);
      }
  }

  // Channels k .. k + kLanes of tiles [t0, t1): runs of neighbours in one row of tiles.
  void invert(int64_t t0, int64_t t1, int64_t k, int64_t sum_step, const float* sums, float* pixels,
              float* staged) const {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, s_.K - k));
    for (int64_t t = t0; t < t1;) {
      const Tiles::Place at = tiles_.place(t);
      const int64_t run = std::min({kRun, t1 - t, tiles_.across - at.x});
      const int64_t row = run * kTile * kLanes;
      for (int64_t i = 0; i < run; ++i) {
        const float* from = sums + (t - t0 + i) * kPanel;
        vf columns[kTile * kPatch];
        for (int j = 0; j < kPatch; ++j) {
          vf m[kPatch];
          for (int l = 0; l < kPatch; ++l) m[l] = load(from + (l * kPatch + j) * sum_step);
          output_1d<1, kPatch>(m, columns + j);
        }
        float* to = pixels + i * kTile * kLanes;
        for (int l = 0; l < kTile; ++l) {
          vf out[kTile];
          output_1d<1, 1>(columns + l * kPatch, out);
          for (int j = 0; j < kTile; ++j) store(to + l * row + j * kLanes, out[j]);
        }
      }
      const int64_t y0 = at.y * kTile, x0 = at.x * kTile;
      const int64_t y1 = std::min(s_.conv_y, y0 + kTile);
      const int64_t x1 = std::min(s_.conv_x, x0 + run * kTile);
      const int pool = pool_kind(s_) == 2 ? 2 : 1;
      // A last row or column that fills no window is left out.
      finish(args_, at.b, k, n, {pixels, row, kLanes, y0, x0}, y1, x1, y0 / pool,
             std::min(s_.out_y, y1 / pool), x0 / pool, std::min(s_.out_x, x1 / pool), staged);
      t += run;
    }
  }

  const ConvForward& args_;
  const ConvSizes& s_;
  Tiles tiles_;
  std::vector<int64_t> depths_;
};

}  // namespace

void winograd_forward(const ConvForward& args, int num_threads) {
  const Winograd winograd(args);
  const int64_t count = winograd.tiles().count, panels = panels_of(args.sizes.K);
  if (count == 0) return;
  int64_t blocks = blocks_of(args.sizes, count);
  // A block for each thread in turn, where that leaves whole register tiles.
  const int64_t even = (blocks + num_threads - 1) / num_threads * num_threads;
  if (count >= even * kMaxRows) blocks = even;
  // Inputs are transformed again for each cut of the panels.
  const int64_t cuts = std::min(panels, (num_threads + blocks - 1) / blocks);
  parallel_for(num_threads, blocks * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / cuts, cut = i % cuts;
      winograd.block(block * count / blocks, (block + 1) * count / blocks, cut * panels / cuts,
                     (cut + 1) * panels / cuts);
    }
  });
}

}  // namespace mbm::MBM_ISA
