// The weight's gradient through Winograd's domain: grad_U = sum over tiles of V^T M', M' = A grad_z
// A^T, then grad_w = G^T grad_U G. A quarter of the products of the direct sum.
#include "conv_bias_act/conv_grad_z.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_winograd.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int kRows = kLanes >= 8 ? kLanes / 2 : kLanes;  // input channels of a register tile
constexpr int64_t kBlockTiles = 112;  // at a time; fewer make grad_w's passes dearer
constexpr int64_t kPartBytes = 32 << 20;
constexpr int64_t kTasks = 16;  // wanted, so that threads end together

class WeightGradient {
 public:
  WeightGradient(const ConvBackward& args, const float* grad_z)
      : args_(args),
        s_(args.sizes),
        tiles_(s_.B, s_.conv_y, s_.conv_x),
        padded_(padded_channels(s_.K)),
        grad_z_{grad_z, s_.conv_y * s_.conv_x * padded_, 1, s_.conv_x * padded_, padded_} {}

  int64_t tiles() const { return tiles_.count; }
  // All tiles at once: a register tile's sum is grad_weight's, and needs no memory of its own.
  bool at_once() const { return tiles_.count <= kBlockTiles; }
  // [panel][channel][9][kPanel]
  int64_t panel_floats() const { return padded_channels(s_.C) * 9 * kPanel; }

  // Adds tiles [t0, t1) of input channels [c0, c1) to sum, or writes grad_weight where these are
  // all; c0 is a multiple of kLanes.
  void add(int64_t t0, int64_t t1, int64_t c0, int64_t c1, float* sum) const {
    const int64_t channels = c1 - c0;
    const TransformedTiles v(std::min(kBlockTiles, t1 - t0), channels);
    ConvMap<const float> x = args_.x;
    x.data += c0 * x.c;
    const int64_t grad_step = v.tiles * kPanel + kLanes;
    const Scratch memory(sizeof(float) *
                         (v.floats() + kPoints * grad_step + (kPoints + 9) * kRows * kPanel));
    float* inputs = memory.as<float>();
    float* grads = inputs + v.floats();
    float* points = grads + kPoints * grad_step;
    float* own = points + kPoints * kRows * kPanel;
    const int64_t blocks = (t1 - t0 + kBlockTiles - 1) / kBlockTiles;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t from = t0 + i * (t1 - t0) / blocks, to = t0 + (i + 1) * (t1 - t0) / blocks;
      const TransformedTiles now(to - from, channels);
      transform_inputs(x, s_.Y, s_.X, s_.top, s_.left, tiles_, from, now, inputs);
      for (int64_t p = 0; p < panels_of(s_.K); ++p) {
        const int vectors = vectors_of(s_.K - p * kPanel);
        transform_gradients(from, to, p, vectors, grad_step, grads);
        const OuterMicroFn micro = outer_micro_for(kRows, vectors);
        for (int64_t c = 0; c < channels; c += kRows) {
          const float* a = inputs + c / kLanes * now.tiles * kLanes + c % kLanes;
          for (int point = 0; point < kPoints; ++point)
            micro(1, now.tiles, a + point * now.point_step, kLanes, 0, grads + point * grad_step,
                  kPanel, 0, points + point * kRows * kPanel, false);
          if (at_once()) {
            std::fill_n(own, 9 * kRows * kPanel, 0.0f);
            turn_back(points, vectors, own);
            unpack(own, p, c0 + c, std::min<int64_t>(kRows, channels - c));
          } else {
            turn_back(points, vectors, sum + p * panel_floats() + (c0 + c) * 9 * kPanel);
          }
        }
      }
    }
  }

  // Channels [c, c + n) of panel p of grad_weight from [n][9][kPanel]; half a panel at a time, so
  // that its rows do not fall into one set of the cache.
  void unpack(const float* sum, int64_t p, int64_t c, int64_t n) const {
    const int64_t row = s_.C * 9;
    for (int64_t k = p * kPanel; k < std::min(s_.K, (p + 1) * kPanel); k += kLanes)
      transpose_rows({sum, kPanel, nullptr}, 0, static_cast<int>(n * 9), k - p * kPanel,
                     std::min<int64_t>(kLanes, s_.K - k), args_.grad_weight + k * row + c * 9, row);
  }

 private:
  // M' of panel p: [point][tile][kPanel].
  void transform_gradients(int64_t t0, int64_t t1, int64_t p, int vectors, int64_t grad_step,
                           float* out) const {
    for (int64_t t = t0; t < t1; ++t) {
      const Tiles::Place at = tiles_.place(t);
      const int64_t y0 = at.y * kTile, x0 = at.x * kTile;
      for (int half = 0; half < vectors; ++half) {
        const float* from = grad_z_.at(at.b, p * kPanel + half * kLanes, y0, x0);
        vf g[kTile * kTile], rows[kPatch * kTile];
        for (int i = 0; i < kTile; ++i)
          for (int j = 0; j < kTile; ++j)
            g[i * kTile + j] = y0 + i < s_.conv_y && x0 + j < s_.conv_x
                                   ? load(from + i * grad_z_.y + j * grad_z_.x)
                                   : zero();
        for (int j = 0; j < kTile; ++j) grad_output_1d<kTile, kTile>(g + j, rows + j);
        float* to = out + (t - t0) * kPanel + half * kLanes;
        for (int i = 0; i < kPatch; ++i) {
          vf m[kPatch];
          grad_output_1d<1, 1>(rows + i * kTile, m);
          for (int j = 0; j < kPatch; ++j) store(to + (i * kPatch + j) * grad_step, m[j]);
        }
      }
    }
  }

  // sum [kRows][9][kPanel] += G^T points [36][kRows][kPanel] G.
  static void turn_back(const float* points, int vectors, float* sum) {
    for (int c = 0; c < kRows; ++c)
      for (int half = 0; half < vectors; ++half) {
        const float* from = points + c * kPanel + half * kLanes;
        vf rows[3 * kPatch];
        for (int j = 0; j < kPatch; ++j) {
          vf u[kPatch];
          for (int i = 0; i < kPatch; ++i) u[i] = load(from + (i * kPatch + j) * kRows * kPanel);
          grad_weight_1d<1, kPatch>(u, rows + j);
        }
        for (int i = 0; i < 3; ++i) {
          vf w[3];
          grad_weight_1d<1, 1>(rows + i * kPatch, w);
          for (int j = 0; j < 3; ++j) {
            float* at = sum + (c * 9 + i * 3 + j) * kPanel + half * kLanes;
            store(at, load(at) + w[j]);
          }
        }
      }
  }

  const ConvBackward& args_;
  const ConvSizes& s_;
  Tiles tiles_;
  int64_t padded_;
  ConvMap<const float> grad_z_;
};

}  // namespace

void winograd_grad_weight(const ConvBackward& args, const float* grad_z, int num_threads) {
  const WeightGradient gradient(args, grad_z);
  const int64_t panels = panels_of(args.sizes.K), tiles = gradient.tiles();
  const int64_t floats = panels * gradient.panel_floats();
  // Tiles are cut into parts with sums of their own, added in order, as far as memory goes.
  const int64_t fitting = std::max<int64_t>(1, kPartBytes / 4 / floats);
  const int64_t parts =
      std::max<int64_t>(1, std::min({fitting, kTasks / 2, tiles / (2 * kBlockTiles)}));
  // The rest of the threads' work is cut by channels, which changes no sum.
  const int64_t blocks = (args.sizes.C + kLanes - 1) / kLanes;
  const int64_t cuts = std::min(blocks, (num_threads + parts - 1) / parts);
  const bool at_once = gradient.at_once();
  const Scratch memory(at_once ? 0 : sizeof(float) * floats * parts);
  float* sums = memory.as<float>();
  parallel_for(num_threads, parts * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / cuts, cut = i % cuts;
      const int64_t c0 = cut * blocks / cuts * kLanes;
      const int64_t c1 = std::min(args.sizes.C, (cut + 1) * blocks / cuts * kLanes);
      float* sum = sums + part * floats;
      for (int64_t p = 0; p < panels && !at_once; ++p) {
        float* from = sum + p * gradient.panel_floats();
        std::fill(from + c0 * 9 * kPanel, from + c1 * 9 * kPanel, 0.0f);
      }
      gradient.add(part * tiles / parts, (part + 1) * tiles / parts, c0, c1, sum);
    }
  });
  if (at_once) return;
  parallel_for(num_threads, panels, 1, [&](int64_t p0, int64_t p1) {
    const int64_t first = p0 * gradient.panel_floats(), last = p1 * gradient.panel_floats();
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = first; i < last; ++i) sums[i] += sums[part * floats + i];
    for (int64_t p = p0; p < p1; ++p)
      gradient.unpack(sums + p * gradient.panel_floats(), p, 0, args.sizes.C);
  });
}

}  // namespace mbm::MBM_ISA
