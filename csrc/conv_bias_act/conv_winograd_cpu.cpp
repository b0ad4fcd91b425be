// Convolution by Winograd's F(4x4, 3x3): blocks of tiles are transformed, multiplied and turned
// back while they are in L2.
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_winograd.h"

namespace mbm::MBM_ISA {

// Panels of kPanel output channels: [panel][point][C][kPanel], see packed_point_step.
int64_t winograd_packed_size(int64_t C, int64_t K) {
  return panels_of(K) * kPoints * packed_point_step(C);
}

namespace {

// The weight as Winograd's products see it: `outputs` and `inputs` are K and C, or C and K.
struct Kernels {
  int64_t outputs, inputs, out_step, in_step, tap_step;
  const float* data;
  bool turned;
  Kernels(const ConvWeight& w, bool transposed)
      : outputs(transposed ? w.C : w.K),
        inputs(transposed ? w.K : w.C),
        out_step(transposed ? w.c_step : w.k_step),
        in_step(transposed ? w.k_step : w.c_step),
        tap_step(w.tap_step),
        data(w.data),
        turned(transposed) {}

  // Taps of inputs [c, c + n), n <= kLanes, of panel p as [n][9][kPanel]. Columns past the panel's
  // last output keep what they were.
  void taps(int64_t p, int64_t c, int n, float* to) const {
    const int count = static_cast<int>(std::min<int64_t>(kPanel, outputs - p * kPanel));
    const float* from = data + p * kPanel * out_step + c * in_step;
    if (out_step == 1) {
      for (int i = 0; i < n; ++i)
        for (int tap = 0; tap < 9; ++tap)
          std::copy_n(from + i * in_step + tap * tap_step, count, to + (i * 9 + tap) * kPanel);
    } else if (in_step == 1) {
      for (int tap = 0; tap < 9; ++tap)
        transpose_rows({from + tap * tap_step, out_step}, 0, count, 0, n, to + tap * kPanel,
                       9 * kPanel);
    } else if (in_step == 9 && tap_step == 1) {
      transpose_rows({from, out_step}, 0, count, 0, n * 9, to, kPanel);
    } else {
      for (int i = 0; i < n; ++i)
        transpose_rows({from + i * in_step, out_step}, 0, count, 0, 9, to + i * 9 * kPanel, kPanel);
    }
  }

  // Panel p: [point][inputs][kPanel], see packed_point_step.
  void pack(int64_t p, float* to) const {
    alignas(64) float staged[kLanes * 9 * kPanel];
    if (outputs < (p + 1) * kPanel) std::fill_n(staged, kLanes * 9 * kPanel, 0.0f);
    const int64_t step = packed_point_step(inputs);
    for (int64_t c0 = 0; c0 < inputs; c0 += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, inputs - c0));
      taps(p, c0, n, staged);
      for (int c = 0; c < n; ++c)
        for (int half = 0; half < kPanel; half += kLanes) {
          vf from[9], rows[3 * kPatch], points[kPoints];
          for (int i = 0; i < 9; ++i)
            from[i] = load(staged + (c * 9 + (turned ? 8 - i : i)) * kPanel + half);
          for (int i = 0; i < 3; ++i) weight_1d<3, 3>(from + i, rows + i);
          for (int i = 0; i < kPatch; ++i) weight_1d<1, 1>(rows + i * 3, points + i * kPatch);
          float* at = to + (c0 + c) * kPanel + half;
          for (int i = 0; i < kPoints; ++i) store(at + i * step, points[i]);
        }
    }
  }
};

}  // namespace

void winograd_pack(const ConvWeight& weight, bool transposed, float* packed, int num_threads) {
  const Kernels kernels(weight, transposed);
  const int threads = weight.K * weight.C < 1024 ? 1 : num_threads;
  const int64_t panel = kPoints * packed_point_step(kernels.inputs);
  parallel_for(threads, panels_of(kernels.outputs), 1, [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) kernels.pack(p, packed + p * panel);
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
      : args_(args),
        s_(args.sizes),
        tiles_(s_.B, s_.conv_y, s_.conv_x),
        kernels_(args.weight, args.weight_transposed),
        panel_floats_(kPoints * packed_point_step(s_.C)) {
    for (int64_t c = 0; c < s_.C; c += kLanes)
      depths_.push_back(std::min<int64_t>(kLanes, s_.C - c));
  }

  const Tiles& tiles() const { return tiles_; }

  // Tiles [t0, t1), panels [p0, p1).
  void block(int64_t t0, int64_t t1, int64_t p0, int64_t p1) const {
    const TransformedTiles v(t1 - t0, s_.C);
    const int64_t sum_step = (t1 - t0) * kPanel + kLanes;  // between two points of M
    const int64_t most = args_.packed ? kSumBytes / (kPoints * sum_step * 4) : 1;
    const int64_t group = std::clamp<int64_t>(most, 1, p1 - p0);
    const Scratch memory(sizeof(float) *
                         (v.floats() + group * kPoints * sum_step + 16 * kRun * kLanes +
                          staged_floats(s_, kTile, kTile * kRun) +
                          (args_.packed ? 0 : panel_floats_)));
    float* inputs = memory.as<float>();
    float* sums = inputs + v.floats();
    float* pixels = sums + group * kPoints * sum_step;
    float* staged = pixels + 16 * kRun * kLanes;
    float* fresh = staged + staged_floats(s_, kTile, kTile * kRun);
    transform_inputs(args_.x, s_.Y, s_.X, s_.top, s_.left, tiles_, t0, v, inputs);
    std::vector<Segment> segments;
    for (size_t i = 0; i < depths_.size(); ++i)
      segments.push_back({static_cast<int64_t>(i) * v.tiles * kLanes, depths_[i]});
    for (int64_t g0 = p0; g0 < p1; g0 += group) {
      const int64_t g1 = std::min(p1, g0 + group);
      if (!args_.packed) kernels_.pack(g0, fresh);
      multiply(v, segments, inputs, args_.packed ? args_.packed + g0 * panel_floats_ : fresh,
               g1 - g0, g0, sum_step, sums);
      for (int64_t p = g0; p < g1; ++p)
        for (int half = 0; half < vectors_of(s_.K - p * kPanel); ++half)
          invert(t0, t1, p * kPanel + half * kLanes, sum_step,
                 sums + (p - g0) * kPoints * sum_step + half * kLanes, pixels, staged);
    }
  }

 private:
  // Panels p0 .. p0 + panels, whose packed kernels these are.
  void multiply(const TransformedTiles& v, const std::vector<Segment>& segments,
                const float* inputs, const float* kernels, int64_t panels, int64_t p0,
                int64_t sum_step, float* sums) const {
    const RowTiles rows(v.tiles);
    for (int point = 0; point < kPoints; ++point)
      for (int64_t p = 0; p < panels; ++p) {
        const float* weights = kernels + p * panel_floats_ + point * packed_point_step(s_.C);
        float* to = sums + (p * kPoints + point) * sum_step;
        const int vectors = vectors_of(s_.K - (p0 + p) * kPanel);
        for (int64_t r = 0; r < rows.tiles; ++r)
          tiles_micro(rows.size(r), vectors)(segments.data(), static_cast<int64_t>(segments.size()),
                                             inputs + point * v.point_step + rows.begin(r) * kLanes,
                                             kLanes, weights, to + rows.begin(r) * kPanel, false);
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
  Kernels kernels_;
  int64_t panel_floats_;
  std::vector<int64_t> depths_;
};

}  // namespace

void winograd_forward(const ConvForward& args, int num_threads) {
  const Winograd winograd(args);
  const int64_t count = winograd.tiles().count, panels = panels_of(args.sizes.K);
  if (count == 0) return;
  // Kernels packed on the way are packed again for each block.
  int64_t blocks = args.packed ? blocks_of(args.sizes, count) : 1;
  // A block for each thread in turn, where that leaves whole register tiles.
  const int64_t even = (blocks + num_threads - 1) / num_threads * num_threads;
  if (args.packed && count >= even * kMaxRows) blocks = even;
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
