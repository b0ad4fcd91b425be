// Depthwise and grouped convolution of NCHW maps: lanes are pixels of a row. Strips of a group's
// planes are copied, padded with 0 and taken apart by the stride, so that the inputs of every tap
// lie side by side; neither x nor y is transposed.
#include <utility>

#include "common/parallel.h"
#include "conv_bias_act/conv_grad_z.h"
#include "conv_bias_act/conv_micro.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_run.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kStripBytes = 16 << 10;  // of the planes of a group, in L1 beside the outputs
constexpr int64_t kTasks = 8;              // of a thread, wanted, so that threads end together
constexpr int kRowsAtOnce = 8;             // of the output: sums of a depthwise register tile
constexpr int kColumnTaps = 7;             // whose weights are in registers beside these
constexpr int kOutputs = 4, kVectors = 3;  // of a grouped register tile
constexpr int64_t kMostStride = 2, kMostGroup = 64;

int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

// The rows and columns of a plane's padded picture that `outputs` rows of the output meet, those of
// one remainder by the stride together: [stride_y][stride_x][height][pitch].
struct PlaneStrip {
  int64_t height, pitch, phase, floats;
  // Of the columns of each remainder: the first that lies in the picture, how many do, and where.
  int64_t first[kMostStride], count[kMostStride], x[kMostStride];

  PlaneStrip(const ConvSizes& s, int64_t outputs)
      : height(outputs + (s.R - 1) / s.stride_y),
        pitch((std::max<int64_t>(s.conv_x, kLanes) + (s.S - 1) / s.stride_x + 2 * kLanes - 1) /
              kLanes * kLanes),
        phase(height * pitch),
        floats(s.stride_y * s.stride_x * phase) {
    const int64_t used = s.conv_x + (s.S - 1) / s.stride_x;
    for (int64_t q = 0; q < s.stride_x; ++q) {
      first[q] = ceil_div(s.left - q, s.stride_x);
      x[q] = first[q] * s.stride_x + q - s.left;
      count[q] = std::min(used, ceil_div(s.X + s.left - q, s.stride_x)) - first[q];
    }
  }

  int64_t tap(const ConvSizes& s, int64_t r, int64_t t) const {
    return (r % s.stride_y * s.stride_x + t % s.stride_x) * phase + r / s.stride_y * pitch +
           t / s.stride_x;
  }
};

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

// Fills the strip of one plane, rows `row` floats apart, for output rows from y on. The columns
// that lie outside of the picture hold 0 already.
void fill_strip(const ConvSizes& s, const PlaneStrip& strip, const float* plane, int64_t row,
                int64_t y, float* to) {
  for (int64_t p = 0; p < s.stride_y; ++p)
    for (int64_t q = 0; q < s.stride_x; ++q) {
      int64_t from_y = y * s.stride_y + p - s.top;
      const float* from = plane + from_y * row + strip.x[q];
      for (int64_t i = 0; i < strip.height; ++i, to += strip.pitch) {
        if (from_y < 0 || from_y >= s.Y)
          for (int64_t j = 0; j < strip.pitch; j += kLanes) store(to + j, zero());
        else if (s.stride_x == 1)
          copy_phase<1>(from, strip.count[q], s.X - strip.x[q], to + strip.first[q]);
        else
          copy_phase<2>(from, strip.count[q], s.X - strip.x[q], to + strip.first[q]);
        from_y += s.stride_y;
        from += s.stride_y * row;
      }
    }
}

// Taps of one column of the kernel, their inputs a row of the strip apart.
struct TapColumn {
  int64_t offset, weights;
  int count;
};

template <int ROWS, int COUNT>
inline __attribute__((always_inline)) void column_taps(const float* x, int64_t pitch,
                                                       const float* weights, int64_t below,
                                                       vf (&acc)[ROWS]) {
  vf w[COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i) w[i] = set1(weights[i * below]);
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
  int64_t count;         // of columns
  const float* weights;  // of the columns at their offsets
  int64_t below;         // floats between the weights of a column
  float bias;
  bool relu;
  float* y;
  int64_t row;
  const float* end;  // of the plane of y
  int width;         // pixels of a row, at most kLanes
};

// One vector of a row of y. A full one may reach into rows below, which are written later.
inline void store_row(float* y, vf v, const float* end, int width) {
  if (end - y >= kLanes)
    store(y, v);
  else
    store_n(y, v, width);
}

template <int ROWS>
void plane_tile(const PlaneTile& t) {
  vf acc[ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) acc[i] = set1(t.bias);
  for (int64_t j = 0; j < t.count; ++j) {
    const float* x = t.strip + t.columns[j].offset;
    const float* w = t.weights + t.columns[j].weights;
    switch (t.columns[j].count) {
      case 1: column_taps<ROWS, 1>(x, t.pitch, w, t.below, acc); break;
      case 2: column_taps<ROWS, 2>(x, t.pitch, w, t.below, acc); break;
      case 3: column_taps<ROWS, 3>(x, t.pitch, w, t.below, acc); break;
      case 4: column_taps<ROWS, 4>(x, t.pitch, w, t.below, acc); break;
      case 5: column_taps<ROWS, 5>(x, t.pitch, w, t.below, acc); break;
      case 6: column_taps<ROWS, 6>(x, t.pitch, w, t.below, acc); break;
      default: column_taps<ROWS, 7>(x, t.pitch, w, t.below, acc);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
    store_row(t.y + i * t.row, t.relu ? max(zero(), acc[i]) : acc[i], t.end, t.width);
}

using PlaneTileFn = void (*)(const PlaneTile&);

template <int... I>
PlaneTileFn plane_tile_of(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr PlaneTileFn table[] = {plane_tile<I + 1>...};
  return table[rows - 1];
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
  const float* w = t.weights;
  for (int64_t j = 0; j < t.count; ++j) {
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

class GroupPlanes {
 public:
  explicit GroupPlanes(const ConvForward& args)
      : args_(args),
        s_(args.sizes),
        inputs_(s_.C / s_.groups),
        outputs_(s_.K / s_.groups),
        height_(height(s_)),
        strip_(s_, height_),
        width_(static_cast<int>(std::min<int64_t>(s_.conv_x, kLanes))),
        vectors_((s_.conv_x + kLanes - 1) / kLanes) {
    const bool plain = s_.activation == Activation::kNone || s_.activation == Activation::kRelu;
    if (args.residual.data || args.places || !plain) finish_ = finish_run_for(s_.activation);
    relu_ = !finish_ && s_.activation == Activation::kRelu;
    depthwise_ = depthwise_fits(s_.C, s_.K, s_.groups);
    for (int64_t t = 0; depthwise_ && t < s_.S; ++t)
      for (int64_t p = 0; p < s_.stride_y; ++p)
        for (int64_t r = p; r < s_.R;) {
          const int64_t left = (s_.R - r + s_.stride_y - 1) / s_.stride_y;
          const int count = static_cast<int>(std::min<int64_t>(left, kColumnTaps));
          columns_.push_back({strip_.tap(s_, r, t), (r * s_.S + t) * kLanes, count});
          r += count * s_.stride_y;
        }
    for (int64_t i = 0; !depthwise_ && i < s_.R * s_.S; ++i)
      taps_.push_back(strip_.tap(s_, i / s_.S, i % s_.S));
  }

  // Groups [begin, end) of all images.
  void groups(int64_t begin, int64_t end) const {
    const int64_t pixels = height_ * s_.conv_x;
    const Scratch memory(sizeof(float) * (inputs_ * strip_.floats + pixels) +
                         static_cast<size_t>(pixels));
    float* strip = memory.as<float>();
    float* z = strip + inputs_ * strip_.floats;
    auto* places = reinterpret_cast<uint8_t*>(z + pixels);
    std::fill_n(strip, inputs_ * strip_.floats, 0.0f);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / s_.groups, g = i % s_.groups;
      for (int64_t y = 0; y < s_.conv_y; y += height_) {
        const int64_t end_y = std::min(s_.conv_y, y + height_);
        for (int64_t c = 0; c < inputs_; ++c)
          fill_strip(s_, strip_, args_.x.at(b, g * inputs_ + c, 0, 0), args_.x.y, y,
                     strip + c * strip_.floats);
        if (depthwise_)
          plane(b, g, y, end_y, strip);
        else
          group(b, g, y, end_y, strip);
        for (int64_t k = g * outputs_; finish_ && k < (g + 1) * outputs_; ++k)
          finish(b, k, y, end_y, z, places);
      }
    }
  }

 private:
  // Rows of the output whose inputs fill a strip.
  static int64_t height(const ConvSizes& s) {
    const int64_t row = PlaneStrip(s, 2).floats - PlaneStrip(s, 1).floats;
    const int64_t fit = kStripBytes / (4 * row * (s.C / s.groups)) - (s.R - 1) / s.stride_y;
    const int64_t least = s.C == s.groups ? kRowsAtOnce : kVectors;
    return std::min(s.conv_y, std::max(fit / least, int64_t{1}) * least);
  }

  // Where vector i of a row begins: the last one ends with the row.
  int64_t column(int64_t i) const {
    return std::min(i * kLanes, std::max<int64_t>(0, s_.conv_x - kLanes));
  }

  void plane(int64_t b, int64_t c, int64_t y0, int64_t y1, const float* strip) const {
    PlaneTile t{};
    t.pitch = strip_.pitch;
    t.columns = columns_.data();
    t.count = static_cast<int64_t>(columns_.size());
    t.weights = args_.packed + c / kLanes * s_.R * s_.S * kLanes + c % kLanes;
    t.below = s_.stride_y * s_.S * kLanes;
    t.bias = args_.bias ? args_.bias[c] : 0.0f;
    t.relu = relu_;
    t.row = args_.y.y;
    t.end = args_.y.at(b, c, s_.conv_y, 0);
    t.width = width_;
    const int64_t tiles = (y1 - y0 + kRowsAtOnce - 1) / kRowsAtOnce;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t y = y0 + i * (y1 - y0) / tiles, end = y0 + (i + 1) * (y1 - y0) / tiles;
      const PlaneTileFn tile =
          plane_tile_of(end - y, std::make_integer_sequence<int, kRowsAtOnce>());
      for (int64_t v = 0; v < vectors_; ++v) {
        t.strip = strip + (y - y0) * strip_.pitch + column(v);
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
  void finish(int64_t b, int64_t k, int64_t y0, int64_t y1, float* z, uint8_t* places) const {
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
  int64_t inputs_, outputs_, height_;
  PlaneStrip strip_;
  int width_;
  int64_t vectors_;  // of a row of the output
  FinishRunFn finish_ = nullptr;
  bool relu_, depthwise_;
  std::vector<TapColumn> columns_;
  std::vector<int64_t> taps_;  // their offsets in the strip, unless depthwise
};

}  // namespace

bool group_planes_fit(const ConvForward& args) {
  const ConvSizes& s = args.sizes;
  const auto rows = [](const auto& map, int64_t width) { return map.x == 1 && map.y == width; };
  if (s.groups == 1 || s.C / s.groups > kMostGroup || pool_kind(s) != 0) return false;
  if (std::max(s.stride_y, s.stride_x) > kMostStride) return false;
  if (s.dilation_y != 1 || s.dilation_x != 1 || args.x.x != 1) return false;
  return rows(args.y, s.conv_x) && (!args.residual.data || rows(args.residual, s.conv_x));
}

void group_planes_forward(const ConvForward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  if (s.B == 0) return;
  const GroupPlanes planes(args);
  const int64_t work = s.B * s.K * s.conv_y * s.conv_x * (s.C / s.groups) * s.R * s.S;
  // Below half a million multiply-adds a second thread costs more than it brings.
  const int threads = work < 500000 ? 1 : num_threads;
  const int64_t all = s.B * s.groups, cuts = std::min<int64_t>(all, kTasks * threads);
  parallel_for(threads, cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) planes.groups(i * all / cuts, (i + 1) * all / cuts);
  });
}

}  // namespace mbm::MBM_ISA
