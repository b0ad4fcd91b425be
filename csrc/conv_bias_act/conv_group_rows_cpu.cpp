// Grouped convolution of channels_last maps, read in place: lanes are the outputs of a group, a
// register tile is a run of pixels of one row, and an input is one value for all lanes.
#include <utility>

#include "common/parallel.h"
#include "conv_bias_act/conv_micro.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_run.h"
#include "conv_bias_act/conv_tile.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kMostGroup = 64;          // channels, whose weights stay near
constexpr int64_t kChunkBytes = 128 << 10;  // of x and y, for all groups in turn
constexpr int64_t kTasks = 8;               // of a thread, wanted, so that threads end together
constexpr int kPixels[] = {kLanes == 16 ? 28 : 14, kMaxRows};  // of a tile of one vector, of two

struct GroupTile {
  const float* x;                     // first tap of the first pixel, first channel of the group
  int64_t row, tap, step;             // floats between rows of taps, neighbouring taps and pixels
  int64_t r0, r1, S;                  // rows [r0, r1) of the kernel lie in the picture
  int64_t left, dilation, stride, X;  // column of the first tap; the picture's are [0, X)
  bool inside;                        // no tap's column lies outside of the picture
  int64_t channels;                   // inputs of the group
  const float* weights;               // [R][S][channel][kPanel]
  const float* bias;                  // of the panel, or null
  int outputs;                        // of the panel
  bool relu;
  float* y;
  int64_t column;  // floats between pixels of y
};

// sums += one tap's inputs times its weights; from(i): the inputs of pixel i.
template <int PX, int NV, class From>
inline __attribute__((always_inline)) void tap_products(int64_t channels, const float* w,
                                                        const From& from, vf (&acc)[PX][NV]) {
  for (int64_t c = 0; c < channels; ++c, w += kPanel) {
    vf v[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) v[j] = load(w + j * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < PX; ++i) {
      const vf x = set1(from(i)[c]);
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(x, v[j], acc[i][j]);
    }
  }
}

alignas(64) constexpr float kZeros[kMostGroup] = {};

template <int PX, int NV>
void group_tile(const GroupTile& t) {
  vf acc[PX][NV];
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) {
    const int n = std::min(kLanes, t.outputs - j * kLanes);
    const vf bias = t.bias ? load_channels(t.bias + j * kLanes, n) : zero();
#pragma GCC unroll 32
    for (int i = 0; i < PX; ++i) acc[i][j] = bias;
  }
  SlicedSums<PX, NV> sums(t.channels);
  for (int64_t r = t.r0; r < t.r1; ++r)
    for (int64_t s = 0; s < t.S; ++s) {
      sums.next(acc);
      const float* at = t.x + r * t.row + s * t.tap;
      const float* w = t.weights + (r * t.S + s) * t.channels * kPanel;
      if (t.inside) {
        tap_products<PX, NV>(t.channels, w, [&](int i) { return at + i * t.step; }, acc);
        continue;
      }
      const float* from[PX];
      for (int i = 0; i < PX; ++i) {
        const int64_t column = t.left + s * t.dilation + i * t.stride;
        from[i] = column >= 0 && column < t.X ? at + i * t.step : kZeros;
      }
      tap_products<PX, NV>(t.channels, w, [&](int i) { return from[i]; }, acc);
    }
  sums.end(acc);
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) {
    const int n = std::min(kLanes, t.outputs - j * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < PX; ++i) {
      const vf y = t.relu ? max(zero(), acc[i][j]) : acc[i][j];
      store_channels(t.y + i * t.column + j * kLanes, y, n);
    }
  }
}

using GroupTileFn = void (*)(const GroupTile&);

template <int NV, int... I>
GroupTileFn group_tile_of(int64_t pixels, std::integer_sequence<int, I...>) {
  static constexpr GroupTileFn table[] = {group_tile<I + 1, NV>...};
  return table[pixels - 1];
}

class GroupRows {
 public:
  explicit GroupRows(const ConvForward& args)
      : args_(args),
        s_(args.sizes),
        inputs_(s_.C / s_.groups),
        outputs_(s_.K / s_.groups),
        panels_(panels_of(outputs_)) {
    finish_ = finish_after_tile(args);
    const int64_t row = s_.stride_y * s_.X * s_.C + s_.conv_x * s_.K;
    height_ = std::clamp<int64_t>(kChunkBytes / (4 * row), 1, s_.conv_y);
  }

  int64_t chunks(int64_t wanted) {
    const int64_t least = (wanted + s_.B - 1) / s_.B;
    chunks_ = std::min(s_.conv_y, std::max(least, (s_.conv_y + height_ - 1) / height_));
    return s_.B * chunks_;
  }

  void chunk(int64_t i) const {
    const int64_t b = i / chunks_, at = i % chunks_;
    const int64_t y0 = at * s_.conv_y / chunks_, y1 = (at + 1) * s_.conv_y / chunks_;
    for (int64_t g = 0; g < s_.groups; ++g)
      for (int64_t panel = 0; panel < panels_; ++panel)
        for (int64_t y = y0; y < y1; ++y) row(b, g, panel, y);
    for (int64_t y = y0; finish_ && y < y1; ++y)
      finish_(channels_run(args_, b, 0, s_.K, y, 0, s_.conv_x));
  }

 private:
  void row(int64_t b, int64_t g, int64_t panel, int64_t y) const {
    const int64_t k = g * outputs_ + panel * kPanel, top = y * s_.stride_y - s_.top;
    GroupTile t{};
    t.row = s_.dilation_y * args_.x.y;
    t.tap = s_.dilation_x * args_.x.x;
    t.step = s_.stride_x * args_.x.x;
    t.r0 = top < 0 ? (-top + s_.dilation_y - 1) / s_.dilation_y : 0;
    t.r1 = top < s_.Y ? std::min(s_.R, (s_.Y - 1 - top) / s_.dilation_y + 1) : 0;
    t.S = s_.S;
    t.dilation = s_.dilation_x;
    t.stride = s_.stride_x;
    t.X = s_.X;
    t.channels = inputs_;
    t.weights = args_.packed + (g * panels_ + panel) * s_.R * s_.S * inputs_ * kPanel;
    t.bias = args_.bias ? args_.bias + k : nullptr;
    t.outputs = static_cast<int>(std::min<int64_t>(kPanel, outputs_ - panel * kPanel));
    t.relu = !finish_ && s_.activation == Activation::kRelu;
    t.column = args_.y.x;
    const int vectors = vectors_of(t.outputs);
    const int64_t tiles = (s_.conv_x + kPixels[vectors - 1] - 1) / kPixels[vectors - 1];
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t x = i * s_.conv_x / tiles, pixels = (i + 1) * s_.conv_x / tiles - x;
      t.left = x * s_.stride_x - s_.left;
      t.inside =
          t.left >= 0 && t.left + (pixels - 1) * s_.stride_x + (s_.S - 1) * s_.dilation_x < s_.X;
      t.x = args_.x.at(b, g * inputs_, top, t.left);
      t.y = args_.y.at(b, k, y, x);
      if (vectors == 1)
        group_tile_of<1>(pixels, std::make_integer_sequence<int, kPixels[0]>())(t);
      else
        group_tile_of<2>(pixels, std::make_integer_sequence<int, kPixels[1]>())(t);
    }
  }

  const ConvForward& args_;
  const ConvSizes& s_;
  int64_t inputs_, outputs_, panels_, height_, chunks_ = 0;
  FinishRunFn finish_ = nullptr;
};

}  // namespace

bool group_rows_fit(const ConvForward& args) {
  const ConvSizes& s = args.sizes;
  if (s.groups == 1 || s.C / s.groups > kMostGroup || pool_kind(s) != 0) return false;
  return args.x.c == 1 && args.y.c == 1 && (!args.residual.data || args.residual.c == 1);
}

void group_rows_forward(const ConvForward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  if (s.B == 0) return;
  const int64_t work = s.B * s.K * s.conv_y * s.conv_x * (s.C / s.groups) * s.R * s.S;
  // Below half a million multiply-adds a second thread costs more than it brings.
  const int threads = work < 500000 ? 1 : num_threads;
  GroupRows rows(args);
  parallel_for(threads, rows.chunks(threads > 1 ? kTasks * threads : 1), 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) rows.chunk(i);
               });
}

}  // namespace mbm::MBM_ISA
