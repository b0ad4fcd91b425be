// Convolution of NCHW maps as a product of matrices whose lanes are pixels: A is the weight [K, C R
// S] where it lies, a panel of B what the taps meet under kPanel neighbouring pixels of an image.
// Nothing is transposed, neither x nor y nor the residual.
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_strip.h"
#include "conv_bias_act/conv_tile.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;  // of panels and sums, in L2
constexpr int64_t kMostPanels = 12;
constexpr int64_t kMostGathered = 8;  // pixels of a row

// out[j] = from[2 j], j < n; floats up to from[room) may be read.
void copy_even(const float* from, int64_t n, int64_t room, float* out) {
  vi even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  int64_t j = 0;
  for (; j + kLanes <= n && 2 * (j + kLanes) <= room; j += kLanes)
    store(out + j, __builtin_shuffle(load(from + 2 * j), load(from + 2 * j + kLanes), even));
  for (; j < n; ++j) out[j] = from[2 * j];
}

class Planes {
 public:
  explicit Planes(const ConvForward& args)
      : args_(args),
        s_(args.sizes),
        w_(args.weight),
        inputs_(s_.C / s_.groups),
        outputs_(s_.K / s_.groups),
        pixels_(s_.conv_y * s_.conv_x),
        panels_(panels_of(pixels_)),
        slices_(inputs_ * s_.R * s_.S),
        finish_(finish_tile_for<true>(s_.activation)) {
    plain_ = s_.R == 1 && s_.S == 1 && s_.stride_y == 1 && s_.stride_x == 1 && s_.top == 0 &&
             s_.left == 0 && s_.conv_y == s_.Y && s_.conv_x == s_.X && args.x.y == s_.X;
    const int64_t floats = slices_.longest() + (slices_.count > 1 ? outputs_ : 0);
    most_ = std::clamp<int64_t>(kBlockBytes / (4 * kPanel * floats), 2, kMostPanels);
    // Rows a power of two apart would share too few sets of L1.
    copies_rows_ = kLanes == 16 && slices_.depth % 512 == 0;
  }

  int64_t blocks() const { return (s_.B * panels_ + most_ - 1) / most_; }
  int64_t tiles() const { return RowTiles(outputs_).tiles; }  // of a group

  // Panels of pixels of block i of blocks(), tiles [t0, t1) of the outputs of group g.
  void block(int64_t i, int64_t g, int64_t t0, int64_t t1) const {
    const int64_t q0 = i * s_.B * panels_ / blocks(), q1 = (i + 1) * s_.B * panels_ / blocks();
    const int64_t longest = slices_.longest() * kPanel, last = slices_.count - 1;
    const RowTiles rows(outputs_);
    Fetch nothing{};
    const int64_t tile_floats = kMaxRows * kPanel;
    const int64_t sums_floats = last > 0 ? (t1 - t0) * (q1 - q0) * tile_floats : tile_floats;
    const Scratch memory(sizeof(float) *
                         ((q1 - q0) * longest + sums_floats + kMaxRows * (slices_.longest() + 16)));
    float* panels = memory.as<float>();
    float* sums = panels + (q1 - q0) * longest;
    float* copied = sums + sums_floats;
    for (int64_t slice = 0; slice <= last; ++slice) {
      const int64_t k0 = slices_.begin(slice), depth = slices_.begin(slice + 1) - k0;
      pack(g, q0, q1, k0, depth, longest, panels);
      for (int64_t t = t0; t < t1; ++t) {
        const float* a = w_.data + (g * outputs_ + rows.begin(t)) * w_.k_step + k0;
        int64_t step = w_.k_step;
        if (copies_rows_) {
          step = slices_.longest() + 16;
          for (int r = 0; r < rows.size(t); ++r)
            std::copy_n(a + r * w_.k_step, depth, copied + r * step);
          a = copied;
        }
        for (int64_t q = q0; q < q1; ++q) {
          const int columns =
              static_cast<int>(std::min<int64_t>(kPanel, pixels_ - q % panels_ * kPanel));
          float* to = last > 0 ? sums + ((t - t0) * (q1 - q0) + q - q0) * tile_floats : sums;
          rows_micro_for(rows.size(t), vectors_of(columns), 0)(
              depth, a, step, panels + (q - q0) * longest, to, slice > 0, nothing);
          if (slice == last)
            finish_(tile(to, rows.size(t), columns, g * outputs_ + rows.begin(t), q));
        }
      }
    }
  }

 private:
  SumTile tile(const float* sums, int rows, int columns, int64_t k, int64_t q) const {
    const int64_t b = q / panels_, p = q % panels_ * kPanel;
    SumTile t{};
    t.sums = sums;
    t.rows = rows;
    t.columns = columns;
    t.y = args_.y.at(b, k, 0, 0) + p;
    t.step = args_.y.c;
    if (args_.residual.data) t.residual = args_.residual.at(b, k, 0, 0) + p;
    t.residual_step = args_.residual.c;
    if (args_.bias) t.bias = args_.bias + k;
    const int64_t at = (b * pixels_ + p) * s_.K + k;
    if (args_.places) t.places = args_.places + at;
    if (args_.z) t.z = args_.z + at;
    t.place_row = 1;
    t.place_column = s_.K;
    return t;
  }

  // Terms [k0, k0 + depth), in the order of the weight, of panels [q0, q1), `longest` floats apart.
  // A plane of x is read from pixel to pixel.
  void pack(int64_t g, int64_t q0, int64_t q1, int64_t k0, int64_t depth, int64_t longest,
            float* to) const {
    const int64_t taps = s_.R * s_.S;
    const bool by_tap = w_.c_step == 1;
    for (int64_t k = k0; k < k0 + depth; ++k, to += kPanel) {
      const int64_t c = by_tap ? k % inputs_ : k / taps, tap = by_tap ? k / inputs_ : k % taps;
      for (int64_t q = q0; q < q1; ++q) {
        const int64_t b = q / panels_, p = q % panels_ * kPanel;
        const int64_t n = std::min<int64_t>(kPanel, pixels_ - p);
        const float* plane = args_.x.at(b, g * inputs_ + c, 0, 0);
        float* panel = to + (q - q0) * longest;
        if (!plain_) {
          gather(plane, p, n, tap, panel);
        } else if (n == kPanel) {
          store(panel, load(plane + p));
          store(panel + kLanes, load(plane + p + kLanes));
        } else {
          std::copy_n(plane + p, n, panel);
        }
        std::fill(panel + n, panel + kPanel, 0.0f);
      }
    }
  }

  // What a tap meets under pixels [p, p + n).
  void gather(const float* plane, int64_t p, int64_t n, int64_t tap, float* to) const {
    const int64_t r = tap / s_.S * s_.dilation_y - s_.top, s = tap % s_.S * s_.dilation_x - s_.left;
    for (int64_t y = p / s_.conv_x, x = p % s_.conv_x; n > 0; ++y, x = 0) {
      const int64_t count = std::min(n, s_.conv_x - x), from_y = y * s_.stride_y + r;
      // Pixels [first, last) of the row meet x.
      const int64_t x0 = x * s_.stride_x + s;
      int64_t first = x0 < 0 ? std::min(count, (s_.stride_x - 1 - x0) / s_.stride_x) : 0;
      int64_t last = x0 < s_.X ? std::min(count, (s_.X - 1 - x0) / s_.stride_x + 1) : 0;
      if (from_y < 0 || from_y >= s_.Y || last <= first) first = last = 0;
      std::fill(to, to + first, 0.0f);
      const float* from = plane + from_y * args_.x.y + x0 + first * s_.stride_x;
      const int64_t valid = last - first;
      if (valid > 0 && s_.stride_x == 1)
        std::copy_n(from, valid, to + first);
      else if (valid > 0 && s_.stride_x == 2)
        copy_even(from, valid, s_.X - x0 - 2 * first, to + first);
      else
        for (int64_t j = 0; j < valid; ++j) to[first + j] = from[j * s_.stride_x];
      std::fill(to + last, to + count, 0.0f);
      to += count;
      n -= count;
    }
  }

  const ConvForward& args_;
  const ConvSizes& s_;
  const ConvWeight& w_;
  int64_t inputs_, outputs_, pixels_, panels_, most_;
  bool plain_, copies_rows_;
  Slices slices_;
  FinishTileFn finish_;
};

// Whether the pixels of an image lie side by side.
template <class T>
bool plane(const ConvMap<T>& map, const ConvSizes& s) {
  return map.x == 1 && (s.conv_y == 1 || map.y == s.conv_x);
}

}  // namespace

bool planes_fit(const ConvForward& args) {
  const ConvSizes& s = args.sizes;
  const ConvWeight& w = args.weight;
  const bool rows = w.k_step == s.C / s.groups * s.R * s.S;
  // Of larger maps the taps of a larger kernel take longer to gather than a strip to transpose.
  const bool gathers = s.R * s.S == 1 || (s.groups == 1 && s.conv_x <= kMostGathered);
  return !args.weight_transposed && rows && pool_kind(s) == 0 && args.x.x == 1 && s.C > 1 &&
         plane(args.y, s) && plane(args.residual, s) && gathers;
}

void planes_forward(const ConvForward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  if (s.B == 0) return;
  const Planes planes(args);
  const int64_t work = s.B * s.conv_y * s.conv_x * s.K * (s.C / s.groups) * s.R * s.S;
  // Below half a million multiply-adds a second thread costs more than it brings.
  const int threads = work < 500000 ? 1 : num_threads;
  const int64_t blocks = planes.blocks(), tiles = planes.tiles();
  const int64_t cuts =
      threads == 1 ? 1
                   : std::min(tiles, (2 * threads + blocks * s.groups - 1) / (blocks * s.groups));
  parallel_for(threads, blocks * s.groups * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t cut = i % cuts, g = i / cuts % s.groups, block = i / cuts / s.groups;
      planes.block(block, g, cut * tiles / cuts, (cut + 1) * tiles / cuts);
    }
  });
}

}  // namespace mbm::MBM_ISA
