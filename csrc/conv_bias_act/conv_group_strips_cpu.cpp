// Depthwise and grouped convolution by strips: a group's planes, or a vector of channels of a
// channels_last map, are copied, padded with 0 and taken apart by the stride, so that each tap's
// inputs are vectors at one offset from the first tap's. Lanes are pixels of a row of NCHW or
// channels; neither x nor y is transposed.
#include <utility>

#include "common/parallel.h"
#include "conv_bias_act/conv_grad_z.h"
#include "conv_bias_act/conv_micro.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_run.h"
#include "conv_bias_act/conv_tile.h"

namespace mbm::MBM_ISA {
namespace {

// Of a strip, in L1 beside the outputs.
constexpr int64_t kPlaneBytes = 16 << 10, kChannelBytes = 24 << 10;
constexpr int64_t kTasks = 8;              // of a thread, wanted, so that threads end together
constexpr int kRowsAtOnce = 8;             // of the output: sums of a depthwise register tile
constexpr int kOutputs = 4, kVectors = 3;  // of a grouped register tile
constexpr int64_t kMostStride = 2, kMostGroup = 64;

int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

// The rows and columns of the padded picture that `outputs` rows of the output meet, those of one
// remainder by the stride together: [stride_y][stride_x][height][pitch] floats, of which a pixel
// takes `pixel`, 1 or kLanes.
struct Strip {
  int64_t pixel, height, pitch, phase, floats;
  // Of the columns of each remainder: the first that lies in the picture, how many do, and where.
  int64_t first[kMostStride], count[kMostStride], x[kMostStride];

  Strip(const ConvSizes& s, bool channels, int64_t outputs)
      : pixel(channels ? kLanes : 1), height(outputs + (s.R - 1) / s.stride_y) {
    const int64_t used = s.conv_x + (s.S - 1) / s.stride_x;
    const int64_t read = used + std::max<int64_t>(0, kLanes - s.conv_x);
    pitch = channels ? used * kLanes : (read + 2 * kLanes - 1) / kLanes * kLanes;
    phase = height * pitch;
    floats = s.stride_y * s.stride_x * phase;
    for (int64_t q = 0; q < s.stride_x; ++q) {
      first[q] = ceil_div(s.left - q, s.stride_x);
      x[q] = first[q] * s.stride_x + q - s.left;
      count[q] = std::min(used, ceil_div(s.X + s.left - q, s.stride_x)) - first[q];
    }
  }

  int64_t tap(const ConvSizes& s, int64_t r, int64_t t) const {
    return (r % s.stride_y * s.stride_x + t % s.stride_x) * phase + r / s.stride_y * pitch +
           t / s.stride_x * pixel;
  }
};

// n vectors of the first `channels` channels, `step` floats apart.
void copy_pixels(const float* from, int64_t step, int64_t n, int64_t channels, float* to) {
  if (channels >= kLanes)
    for (int64_t j = 0; j < n; ++j) store(to + j * kLanes, load(from + j * step));
  else
    for (int64_t j = 0; j < n; ++j)
      store(to + j * kLanes, load_n(from + j * step, static_cast<int>(channels)));
}

// to[j] = from[j * stride], j < n, then 0 up to a whole vector; `left` floats lie from `from` on.
template <int stride>
void copy_phase(const float* from, int64_t n, int64_t left, float* to) {
  const auto at = [&](int64_t i) {
    const int64_t there = left - i;
    if (there >= kLanes) return load(from + i);
    return load_n(from + i, static_cast<int>(std::max<int64_t>(there, 0)));
  };
  vi even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  for (int64_t j = 0; j < n; j += kLanes) {
    if constexpr (stride == 1)
      store(to + j, at(j));
    else
      store(to + j, __builtin_shuffle(at(2 * j), at(2 * j + kLanes), even));
  }
}

// Fills the strip of the plane of x from `plane` on, or of up to kLanes of its `channels` channels,
// for output rows from y on. The columns that lie outside of the picture hold 0 already.
void fill_strip(const ConvForward& args, const Strip& strip, const float* plane, int64_t channels,
                int64_t y, float* to) {
  const ConvSizes& s = args.sizes;
  const ConvMap<const float>& x = args.x;
  const int64_t odd = s.stride_y - 1;  // strides are 1 or 2
  // Row by row as they lie in memory, which the hardware fetches ahead.
  for (int64_t i = 0; i < strip.height * s.stride_y; ++i) {
    const int64_t from_y = y * s.stride_y - s.top + i;
    float* row = to + ((i & odd) * s.stride_x * strip.height + (i >> odd)) * strip.pitch;
    for (int64_t q = 0; q < s.stride_x; ++q, row += strip.phase) {
      if (from_y < 0 || from_y >= s.Y) {
        for (int64_t j = 0; j < strip.pitch; j += kLanes) store(row + j, zero());
        continue;
      }
      const float* from = plane + from_y * x.y + strip.x[q] * x.x;
      const int64_t left = s.X - strip.x[q];
      float* first = row + strip.first[q] * strip.pixel;
      if (strip.pixel > 1)
        copy_pixels(from, s.stride_x * x.x, strip.count[q], channels, first);
      else if (s.stride_x == 1)
        copy_phase<1>(from, strip.count[q], left, first);
      else
        copy_phase<2>(from, strip.count[q], left, first);
    }
  }
}

// A column of the kernel: two runs of taps, or one. The inputs of a run's taps lie a row of the
// strip apart.
struct TapColumn {
  int64_t offset[2], weights[2];
};

// across: a weight for each lane.
template <int ROWS, int COUNT, bool across>
inline __attribute__((always_inline)) void column_taps(const float* x, int64_t pitch,
                                                       const float* weights, int64_t below,
                                                       vf (&acc)[ROWS]) {
  vf w[COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i)
    w[i] = across ? load(weights + i * below) : set1(weights[i * below]);
#pragma GCC unroll 16
  for (int l = 0; l < ROWS + COUNT - 1; ++l, x += pitch) {
    const vf v = load(x);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i)
      if (l >= i && l - i < ROWS) acc[l - i] = fma(v, w[i], acc[l - i]);
  }
}

struct PlaneTile {
  const float* strip;  // first row and column of the tile
  int64_t pitch;
  const TapColumn* columns;
  int64_t count;
  const float* weights;  // of the columns at their offsets
  int64_t below;         // floats between the weights of a column
  vf bias;
  bool relu;
  float* y;
  int64_t row;
  const float* end;  // of the plane of y
  int width;         // lanes that count
};

// One vector of a row of y. A full one may reach into rows below, which are written later.
inline void store_row(float* y, vf v, const float* end, int width) {
  if (end - y >= kLanes)
    store(y, v);
  else
    store_n(y, v, width);
}

// A and B: taps of the two runs of a column.
template <int ROWS, int A, int B, bool across>
void plane_tile(const PlaneTile& t) {
  vf acc[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) acc[i] = t.bias;
  for (int64_t j = 0; j < t.count; ++j) {
    const TapColumn& column = t.columns[j];
    column_taps<ROWS, A, across>(t.strip + column.offset[0], t.pitch, t.weights + column.weights[0],
                                 t.below, acc);
    if constexpr (B > 0)
      column_taps<ROWS, B, across>(t.strip + column.offset[1], t.pitch,
                                   t.weights + column.weights[1], t.below, acc);
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    const vf y = t.relu ? max(zero(), acc[i]) : acc[i];
    if constexpr (across)
      store_channels(t.y + i * t.row, y, t.width);
    else
      store_row(t.y + i * t.row, y, t.end, t.width);
  }
}

using PlaneTileFn = void (*)(const PlaneTile&);

template <int A, int B, bool across, int... I>
PlaneTileFn plane_tile_of(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr PlaneTileFn table[] = {plane_tile<I + 1, A, B, across>...};
  return table[rows - 1];
}

// Taps of a column's first run: the weights of a run stay in registers beside the sums, and those
// of a stride of 2 meet rows of one remainder.
int64_t first_run(int64_t R, int64_t stride) { return stride == 1 && R <= 5 ? R : (R + 1) / 2; }

template <bool across>
PlaneTileFn plane_tile_for(int64_t R, int64_t stride, int64_t rows) {
  using Rows = std::make_integer_sequence<int, kRowsAtOnce>;
  switch (R * 2 + stride) {
    case 7: return plane_tile_of<3, 0, across>(rows, Rows());
    case 8: return plane_tile_of<2, 1, across>(rows, Rows());
    case 11: return plane_tile_of<5, 0, across>(rows, Rows());
    case 12: return plane_tile_of<3, 2, across>(rows, Rows());
    default: return plane_tile_of<4, 3, across>(rows, Rows());
  }
}

// Sums of kOutputs outputs of a group at N vectors of pixels.
struct GroupTile {
  const float* x[kVectors];  // of the strip of the first plane
  const int64_t* taps;       // their offsets
  int64_t count, channels, plane;
  const float* weights;  // [tap][channel][kPanel]
  float bias[kOutputs];
  bool relu;
  float* y[kVectors];   // of the first output; rows in their order
  const float* end;     // of its plane
  int64_t outputs, to;  // how many there are, and floats between their planes
  int width;
};

template <int N>
void group_tile(const GroupTile& t) {
  vf acc[kOutputs][N];
#pragma GCC unroll 4
  for (int k = 0; k < kOutputs; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) acc[k][i] = set1(t.bias[k]);
  SlicedSums<kOutputs, N> sums(t.channels);
  const float* w = t.weights;
  for (int64_t j = 0; j < t.count; ++j) {
    sums.next(acc);
    int64_t at = t.taps[j];
    for (int64_t c = 0; c < t.channels; ++c, at += t.plane, w += kPanel) {
      vf x[N];
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) x[i] = load(t.x[i] + at);
#pragma GCC unroll 4
      for (int k = 0; k < kOutputs; ++k) {
        const vf wk = set1(w[k]);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) acc[k][i] = fma(x[i], wk, acc[k][i]);
      }
    }
  }
  sums.end(acc);
#pragma GCC unroll 4
  for (int k = 0; k < kOutputs; ++k) {
    if (k >= t.outputs) break;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const vf y = t.relu ? max(zero(), acc[k][i]) : acc[k][i];
      store_row(t.y[i] + k * t.to, y, t.end + k * t.to, t.width);
    }
  }
}

class GroupStrips {
 public:
  explicit GroupStrips(const ConvForward& args)
      : args_(args),
        s_(args.sizes),
        channels_(args.x.x != 1),
        inputs_(s_.C / s_.groups),
        outputs_(s_.K / s_.groups),
        height_(height(s_, channels_)),
        strip_(s_, channels_, height_),
        width_(static_cast<int>(std::min<int64_t>(s_.conv_x, kLanes))),
        vectors_(channels_ ? s_.conv_x : (s_.conv_x + kLanes - 1) / kLanes) {
    finish_ = finish_after_tile(args);
    relu_ = !finish_ && s_.activation == Activation::kRelu;
    depthwise_ = depthwise_fits(s_.C, s_.K, s_.groups);
    const int64_t second = s_.stride_y == 1 ? first_run(s_.R, 1) : 1;
    for (int64_t t = 0; depthwise_ && t < s_.S; ++t)
      columns_.push_back({{strip_.tap(s_, 0, t), strip_.tap(s_, second, t)},
                          {t * kLanes, (second * s_.S + t) * kLanes}});
    for (int64_t i = 0; !depthwise_ && i < s_.R * s_.S; ++i)
      taps_.push_back(strip_.tap(s_, i / s_.S, i % s_.S));
  }

  // Of an image: groups, or vectors of channels.
  int64_t parts() const { return channels_ ? (s_.C + kLanes - 1) / kLanes : s_.groups; }

  // Parts [p0, p1) of image b.
  void parts(int64_t b, int64_t p0, int64_t p1) const {
    const int64_t pixels = height_ * s_.conv_x;
    const Scratch memory(sizeof(float) * (inputs_ * strip_.floats + pixels) +
                         static_cast<size_t>(pixels));
    float* strip = memory.as<float>();
    float* z = strip + inputs_ * strip_.floats;
    auto* places = reinterpret_cast<uint8_t*>(z + pixels);
    std::fill_n(strip, inputs_ * strip_.floats, 0.0f);
    for (int64_t y = 0; y < s_.conv_y; y += height_) {
      const int64_t end = std::min(s_.conv_y, y + height_);
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t c0 = channels_ ? p * kLanes : p * inputs_;
        for (int64_t c = 0; c < inputs_; ++c)
          fill_strip(args_, strip_, args_.x.at(b, c0 + c, 0, 0), s_.C - c0, y,
                     strip + c * strip_.floats);
        if (depthwise_)
          plane(b, c0, y, end, strip);
        else
          group(b, p, y, end, strip);
        for (int64_t k = p * outputs_; finish_ && !channels_ && k < (p + 1) * outputs_; ++k)
          finish_plane(b, k, y, end, z, places);
        for (int64_t row = y; finish_ && channels_ && row < end; ++row)
          finish_(
              channels_run(args_, b, c0, std::min<int64_t>(kLanes, s_.K - c0), row, 0, s_.conv_x));
      }
    }
  }

 private:
  // Rows of the output whose inputs fill a strip.
  static int64_t height(const ConvSizes& s, bool channels) {
    const int64_t row = Strip(s, channels, 2).floats - Strip(s, channels, 1).floats;
    const int64_t bytes = channels ? kChannelBytes : kPlaneBytes;
    const int64_t fit = bytes / (4 * row * (s.C / s.groups)) - (s.R - 1) / s.stride_y;
    const int64_t least = s.C == s.groups ? kRowsAtOnce : kVectors;
    return std::min(s.conv_y, std::max(fit / least, int64_t{1}) * least);
  }

  // Where vector i of a row begins: the last one ends with the row.
  int64_t column(int64_t i) const {
    return channels_ ? i : std::min(i * kLanes, std::max<int64_t>(0, s_.conv_x - kLanes));
  }

  // Channel c, or a vector of them from there on.
  void plane(int64_t b, int64_t c, int64_t y0, int64_t y1, const float* strip) const {
    PlaneTile t;
    t.pitch = strip_.pitch;
    t.columns = columns_.data();
    t.count = static_cast<int64_t>(columns_.size());
    t.weights = args_.packed + c / kLanes * s_.R * s_.S * kLanes + c % kLanes;
    t.below = s_.stride_y * s_.S * kLanes;
    t.relu = relu_;
    t.row = args_.y.y;
    t.width = width_;
    if (channels_) {
      t.width = static_cast<int>(std::min<int64_t>(kLanes, s_.K - c));
      t.bias = args_.bias ? load_channels(args_.bias + c, t.width) : zero();
      t.end = nullptr;
    } else {
      t.bias = set1(args_.bias ? args_.bias[c] : 0.0f);
      t.end = args_.y.at(b, c, s_.conv_y, 0);
    }
    const int64_t tiles = (y1 - y0 + kRowsAtOnce - 1) / kRowsAtOnce;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t y = y0 + i * (y1 - y0) / tiles, end = y0 + (i + 1) * (y1 - y0) / tiles;
      const PlaneTileFn tile = channels_ ? plane_tile_for<true>(s_.R, s_.stride_y, end - y)
                                         : plane_tile_for<false>(s_.R, s_.stride_y, end - y);
      for (int64_t v = 0; v < vectors_; ++v) {
        t.strip = strip + (y - y0) * strip_.pitch + column(v) * strip_.pixel;
        t.y = args_.y.at(b, c, y, column(v));
        tile(t);
      }
    }
  }

  void group(int64_t b, int64_t g, int64_t y0, int64_t y1, const float* strip) const {
    static constexpr void (*kTiles[])(const GroupTile&) = {group_tile<1>, group_tile<2>,
                                                           group_tile<3>};
    const int64_t vectors = (y1 - y0) * vectors_, tiles = (vectors + kVectors - 1) / kVectors;
    GroupTile t{};
    t.taps = taps_.data();
    t.count = s_.R * s_.S;
    t.channels = inputs_;
    t.plane = strip_.floats;
    t.relu = relu_;
    t.to = args_.y.c;
    t.width = width_;
    for (int64_t k = 0; k < outputs_; k += kOutputs) {
      t.outputs = std::min<int64_t>(kOutputs, outputs_ - k);
      t.end = args_.y.at(b, g * outputs_ + k, s_.conv_y, 0);
      for (int64_t i = 0; i < t.outputs; ++i)
        t.bias[i] = args_.bias ? args_.bias[g * outputs_ + k + i] : 0.0f;
      t.weights = args_.packed + k % kPanel +
                  (g * panels_of(outputs_) + k / kPanel) * t.count * inputs_ * kPanel;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = i * vectors / tiles, end = (i + 1) * vectors / tiles;
        for (int64_t v = first; v < end; ++v) {
          const int64_t row = v / vectors_, x = column(v % vectors_);
          t.x[v - first] = strip + row * strip_.pitch + x;
          t.y[v - first] = args_.y.at(b, g * outputs_ + k, y0 + row, x);
        }
        kTiles[end - first - 1](t);
      }
    }
  }

  // Rows [y0, y1) of output k, of which y holds the sums. What is saved lies channel by channel.
  void finish_plane(int64_t b, int64_t k, int64_t y0, int64_t y1, float* z, uint8_t* places) const {
    const int64_t n = (y1 - y0) * s_.conv_x;
    finish_({args_.y.at(b, k, y0, 0),
             args_.residual.data ? args_.residual.at(b, k, y0, 0) : nullptr,
             args_.places ? places : nullptr, args_.z ? z : nullptr, n});
    const int64_t saved = (b * s_.conv_y + y0) * s_.conv_x * s_.K + k;
    for (int64_t i = 0; args_.places && i < n; ++i) args_.places[saved + i * s_.K] = places[i];
    for (int64_t i = 0; args_.z && i < n; ++i) args_.z[saved + i * s_.K] = z[i];
  }

  const ConvForward& args_;
  const ConvSizes& s_;
  bool channels_;
  int64_t inputs_, outputs_, height_;
  Strip strip_;
  int width_;
  int64_t vectors_;  // of a row of the output
  FinishRunFn finish_ = nullptr;
  bool relu_, depthwise_;
  std::vector<TapColumn> columns_;
  std::vector<int64_t> taps_;  // their offsets in the strip, unless depthwise
};

}  // namespace

bool group_strips_fit(const ConvForward& args) {
  const ConvSizes& s = args.sizes;
  if (s.groups == 1 || s.C / s.groups > kMostGroup || pool_kind(s) != 0) return false;
  if (std::max(s.stride_y, s.stride_x) > kMostStride) return false;
  if (s.dilation_y != 1 || s.dilation_x != 1) return false;
  const bool depthwise = depthwise_fits(s.C, s.K, s.groups), residual = args.residual.data;
  if (depthwise && s.R != 3 && s.R != 5 && s.R != 7) return false;
  if (args.x.x != 1)
    return depthwise && args.x.c == 1 && args.y.c == 1 && (!residual || args.residual.c == 1);
  const auto rows = [&s](const auto& map) { return map.x == 1 && map.y == s.conv_x; };
  return rows(args.y) && (!residual || rows(args.residual));
}

void group_strips_forward(const ConvForward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  if (s.B == 0) return;
  const GroupStrips strips(args);
  const int64_t work = s.B * s.K * s.conv_y * s.conv_x * (s.C / s.groups) * s.R * s.S;
  // Below half a million multiply-adds a second thread costs more than it brings.
  const int threads = work < 500000 ? 1 : num_threads;
  const int64_t parts = strips.parts(), wanted = threads > 1 ? kTasks * threads : 1;
  const int64_t cuts = std::min(parts, (wanted + s.B - 1) / s.B);
  parallel_for(threads, s.B * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      strips.parts(i / cuts, i % cuts * parts / cuts, (i % cuts + 1) * parts / cuts);
  });
}

}  // namespace mbm::MBM_ISA
