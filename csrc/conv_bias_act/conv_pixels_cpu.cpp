// Convolution of channels_last maps as a product of matrices: a row of A is what the taps of one
// pixel meet, [R][S][channel] as in the packed weight. Rows lie in place where
// the kernel is 1x1 with stride 1, else a block of them is copied, slice by slice.
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_strip.h"
#include "conv_bias_act/conv_tile.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kMostTiles = 16;  // of a block of pixels
constexpr int64_t kBlockRows = kMostTiles * kMaxRows;
// Of a block's rows, beside the weights where these are few.
constexpr int64_t kInL1 = 16 << 10, kInL2 = 128 << 10;
constexpr int64_t kFetchedBytes = 256 << 10;  // of x and y together
constexpr int64_t kWeightBytes = 256 << 10;

// Whether pixel i of the batch lies at i * map.x.
template <class T>
bool flat(const ConvMap<T>& map, int64_t B, int64_t Y, int64_t X) {
  return (Y == 1 || map.y == X * map.x) && (B == 1 || map.b == Y * X * map.x);
}

class Pixels {
 public:
  explicit Pixels(const ConvForward& args)
      : args_(args),
        s_(args.sizes),
        inputs_(s_.C / s_.groups),
        outputs_(s_.K / s_.groups),
        panels_(panels_of(outputs_)),
        pixels_(s_.B * s_.conv_y * s_.conv_x),
        in_place_(s_.R == 1 && s_.S == 1 && s_.stride_y == 1 && s_.stride_x == 1 && s_.top == 0 &&
                  s_.left == 0 && s_.conv_y == s_.Y && s_.conv_x == s_.X &&
                  flat(args.x, s_.B, s_.Y, s_.X)),
        slices_(inputs_ * s_.R * s_.S),
        pitch_(in_place_ ? args.x.x : slices_.longest() + 2 * kLanes),
        finish_(finish_tile_for<false>(s_.activation)) {
    const int64_t weights = panels_ * slices_.depth * kPanel * 4;
    const int64_t most = weights > kWeightBytes || !in_place_ ? kInL2 : kInL1;
    const int64_t tile = kMaxRows * slices_.longest() * 4;
    rows_ = kMaxRows * std::clamp<int64_t>(most / tile, 1, kMostTiles);
    const int64_t bytes = 4 * s_.B * (s_.C * s_.Y * s_.X + s_.K * s_.conv_y * s_.conv_x);
    fetches_ = bytes < kFetchedBytes ? 0 : args.residual.data ? 3 : 2;
    flat_y_ = flat(args.y, s_.B, s_.conv_y, s_.conv_x);
  }

  int64_t blocks() const { return (pixels_ + rows_ - 1) / rows_; }
  int64_t panels() const { return s_.groups * panels_; }

  // Pixels of block i of blocks(); panels [p0, p1) of all groups'.
  void block(int64_t i, int64_t p0, int64_t p1) const {
    const int64_t m0 = i * pixels_ / blocks(), m1 = (i + 1) * pixels_ / blocks();
    const int64_t count = m1 - m0, last = slices_.count - 1;
    const int64_t kept = last > 0 ? std::min(panels_, p1 - p0) * count : kMaxRows;
    const Scratch memory(sizeof(float) * (kept * kPanel + (in_place_ ? 0 : count * pitch_)));
    float* sums = memory.as<float>();
    float* copied = sums + kept * kPanel;
    int64_t offsets[kBlockRows], residual_offsets[kBlockRows];
    for (int64_t m = m0; m < m1; ++m) {
      const Place at = place(m);
      offsets[m - m0] = args_.y.at(at.b, 0, at.y, at.x) - args_.y.data;
      if (args_.residual.data)
        residual_offsets[m - m0] = args_.residual.at(at.b, 0, at.y, at.x) - args_.residual.data;
    }
    const RowTiles tiles(count);
    Fetch fetch = next(i, p1 - p0, tiles.tiles);
    for (int64_t g = p0 / panels_; g * panels_ < p1; ++g) {
      const int64_t first = std::max(p0, g * panels_), end = std::min(p1, (g + 1) * panels_);
      for (int64_t slice = 0; slice <= last; ++slice) {
        const int64_t k0 = slices_.begin(slice), depth = slices_.begin(slice + 1) - k0;
        const float* rows = args_.x.data + m0 * args_.x.x + g * inputs_ + k0;
        if (!in_place_) {
          copy(g, m0, m1, k0, depth, copied);
          rows = copied;
        }
        for (int64_t p = first; p < end; ++p) {
          const int64_t k = (p - g * panels_) * kPanel;
          const int columns = static_cast<int>(std::min<int64_t>(kPanel, outputs_ - k));
          const float* weights = args_.packed + p * slices_.depth * kPanel + k0 * kPanel;
          for (int64_t t = 0; t < tiles.tiles; ++t) {
            const int64_t m = tiles.begin(t);
            float* to = last > 0 ? sums + ((p - first) * count + m) * kPanel : sums;
            rows_micro_for(tiles.size(t), vectors_of(columns), fetches_)(
                depth, rows + m * pitch_, pitch_, weights, to, slice > 0, fetch);
            if (slice == last)
              finish_(tile(to, tiles.size(t), columns, g * outputs_ + k, m0 + m, offsets + m,
                           residual_offsets + m));
          }
        }
      }
    }
  }

 private:
  // What block i + 1 reads and writes, while `panels` panels of block i are computed.
  Fetch next(int64_t i, int64_t panels, int64_t tiles) const {
    const int64_t m0 = (i + 1) * pixels_ / blocks(), m1 = (i + 2) * pixels_ / blocks();
    const bool more = i + 1 < blocks();
    const int64_t turns = panels * tiles * slices_.depth;
    Fetch fetch{reinterpret_cast<const char*>(args_.x.data),
                reinterpret_cast<const char*>(args_.y.data),
                reinterpret_cast<const char*>(args_.residual.data),
                0,
                0,
                0};
    if (more && in_place_) {
      fetch.in += m0 * args_.x.x * 4;
      fetch.in_step = (m1 - m0) * args_.x.x * 4 / turns;
    }
    if (more && flat_y_) {
      fetch.out += m0 * args_.y.x * 4;
      fetch.out_step = (m1 - m0) * args_.y.x * 4 / turns;
    }
    if (more && args_.residual.data && flat(args_.residual, s_.B, s_.conv_y, s_.conv_x)) {
      fetch.residual += m0 * args_.residual.x * 4;
      fetch.residual_step = (m1 - m0) * args_.residual.x * 4 / turns;
    }
    return fetch;
  }

  struct Place {
    int64_t b, y, x;
  };
  Place place(int64_t m) const {
    return {m / (s_.conv_x * s_.conv_y), m / s_.conv_x % s_.conv_y, m % s_.conv_x};
  }

  SumTile tile(const float* sums, int rows, int columns, int64_t k, int64_t m,
               const int64_t* offsets, const int64_t* residual_offsets) const {
    SumTile t{};
    t.sums = sums;
    t.rows = rows;
    t.columns = columns;
    t.y = args_.y.data + k;
    t.offsets = offsets;
    if (args_.residual.data) t.residual = args_.residual.data + k;
    t.residual_offsets = residual_offsets;
    if (args_.bias) t.bias = args_.bias + k;
    if (args_.places) t.places = args_.places + m * s_.K + k;
    if (args_.z) t.z = args_.z + m * s_.K + k;
    t.place_row = s_.K;
    t.place_column = 1;
    return t;
  }

  // Terms [k0, k0 + depth) of the rows of pixels [m0, m1), pitch_ floats apart.
  void copy(int64_t g, int64_t m0, int64_t m1, int64_t k0, int64_t depth, float* to) const {
    // What lies side by side in x: a row of the kernel, or one tap.
    const bool whole = s_.dilation_x == 1 && args_.x.x == inputs_;
    const int64_t taps = whole ? s_.S : 1, run = taps * inputs_, across = s_.S / taps;
    for (int64_t m = m0; m < m1; ++m, to += pitch_) {
      const Place at = place(m);
      const int64_t y0 = at.y * s_.stride_y - s_.top, x0 = at.x * s_.stride_x - s_.left;
      for (int64_t k = k0, i = k0 / run; k < k0 + depth; ++i) {
        const int64_t y = y0 + i / across * s_.dilation_y;
        const int64_t x = x0 + i % across * s_.dilation_x;
        const int64_t end = std::min(k0 + depth, (i + 1) * run);
        const bool inside = y >= 0 && y < s_.Y;
        // Terms [first, last) lie within the picture.
        const int64_t first =
            inside ? std::clamp(i * run - std::min<int64_t>(x, 0) * inputs_, k, end) : end;
        const int64_t last = std::clamp(i * run + (s_.X - x) * inputs_, first, end);
        std::fill(to + k - k0, to + first - k0, 0.0f);
        if (first < last)
          std::memcpy(to + first - k0,
                      args_.x.at(at.b, g * inputs_, y, 0) + x * args_.x.x + (first - i * run),
                      sizeof(float) * static_cast<size_t>(last - first));
        std::fill(to + last - k0, to + end - k0, 0.0f);
        k = end;
      }
    }
  }

  const ConvForward& args_;
  const ConvSizes& s_;
  int64_t inputs_, outputs_, panels_, pixels_;
  bool in_place_, flat_y_;
  Slices slices_;
  int64_t pitch_, rows_;
  int fetches_;
  FinishTileFn finish_;
};

}  // namespace

bool pixels_fit(const ConvForward& args) {
  const ConvSizes& s = args.sizes;
  if (args.x.c != 1 || args.y.c != 1 || pool_kind(s) != 0) return false;
  if (args.residual.data && args.residual.c != 1) return false;
  return s.groups == 1 || (s.R == 1 && s.S == 1);
}

void pixels_forward(const ConvForward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  if (s.B == 0) return;
  const Pixels pixels(args);
  const int64_t work = s.B * s.conv_y * s.conv_x * s.K * (s.C / s.groups) * s.R * s.S;
  // Below half a million multiply-adds a second thread costs more than it brings.
  const int threads = work < 500000 ? 1 : num_threads;
  const int64_t blocks = pixels.blocks(), panels = pixels.panels();
  const int64_t cuts = threads == 1 ? 1 : std::min(panels, (2 * threads + blocks - 1) / blocks);
  parallel_for(threads, blocks * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t cut = i % cuts;
      pixels.block(i / cuts, cut * panels / cuts, (cut + 1) * panels / cuts);
    }
  });
}

}  // namespace mbm::MBM_ISA
