// Depthwise convolution of channels_last maps, read in place: lanes are channels, a register tile
// is a run of pixels of one row, and each input is loaded once for all taps of a kernel's row.
#include <utility>

#include "conv_bias_act/conv_epilogue.h"
#include "conv_bias_act/conv_grad_z.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_run.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kTasks = 8;  // of a thread, wanted, so that threads end together
// Of x and y together: more than the last cache holds, so that a reader of y finds nothing there.
constexpr int64_t kStreamBytes = 32 << 20;
// Of x and y of an image, so that its results do not depend on the batch.
constexpr int64_t kImageBytes = 3 << 20;
constexpr int64_t kParts = 16;
constexpr int64_t kPartBytes = 32 << 20;
constexpr int64_t kRun = 28;  // pixels whose products are summed in registers, in grad_weight

// A tile of two rows of the output: each input serves both, so that loads are no more than
// products. Its sums, two weights and an input fill the registers.
constexpr int kWidth = kLanes == 16 ? 12 : 6;

// Reads `floats` once in the order of memory, which the hardware fetches ahead: by itself a tile's
// pixels lie too far apart for it (3x3 from memory, 1 thread: 4.4 -> 1.7 ms).
void touch(const float* data, int64_t floats) {
  constexpr int64_t kLine = 16;
  for (int64_t i = 0; i < floats; i += kLine) {
    const int32_t value = reinterpret_cast<const int32_t*>(data)[i];
    asm volatile("" : : "r"(value));
  }
}

// Rows [from, to) of image b.
void touch_rows(const ConvMap<const float>& x, const ConvSizes& s, int64_t b, int64_t from,
                int64_t to) {
  for (int64_t y = from; y < to; ++y) touch(x.at(b, 0, y, 0), (s.X - 1) * x.x + s.C);
}

// Fetches memory into L2 in its own order, a share with each tile.
class Ahead {
 public:
  Ahead(const float* from, const float* end, int64_t tiles)
      : at_(reinterpret_cast<const char*>(from)),
        end_(reinterpret_cast<const char*>(end)),
        share_(((end_ - at_) / tiles + kLine - 1) / kLine * kLine) {}

  void fetch() {
    const char* end = std::min(end_, at_ + share_);
    for (; at_ < end; at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_, *end_;
  int64_t share_;
};

struct DepthwiseTile {
  const float* x;          // first tap of the first pixel, first row of inputs
  int64_t row, tap, step;  // floats between rows, neighbouring taps and neighbouring pixels
  int rows;                // of inputs
  int kernel_row[2];       // that the first row of inputs meets, for each row of the output
  int R, S;
  int64_t left, stride, X;  // column of the first tap; the picture's are [0, X)
  bool inside;              // no tap lies outside of the picture
  int n;                    // channels
  const float* weights;     // [R][S][kLanes]
  const float* bias;        // kLanes floats, or null
  bool relu, streams;
  float* out;
  int64_t out_row, out_column;
  int out_rows;  // 1 or 2
};

// sums[o] += one row of inputs times the kernel's row weights[o], of the rows FIRST <= o < LAST.
// PART: fewer channels than lanes.
template <int PX, int FIRST, int LAST, bool PART>
inline __attribute__((always_inline)) void depthwise_row(const DepthwiseTile& t, const float* at,
                                                         const float* const* weights,
                                                         vf (&acc)[2][PX]) {
  for (int s = 0; s < t.S; ++s, at += t.tap) {
    vf w[2];
#pragma GCC unroll 2
    for (int o = FIRST; o < LAST; ++o) w[o] = load(weights[o] + s * kLanes);
    // Pixels [first, last) have this tap within the picture.
    int64_t first = 0, last = PX;
    if (!t.inside) {
      const int64_t column = t.left + s;
      while (first < PX && column + first * t.stride < 0) ++first;
      while (last > first && column + (last - 1) * t.stride >= t.X) --last;
    }
    const auto run = [&](const auto& meets) {
#pragma GCC unroll 16
      for (int i = 0; i < PX; ++i) {
        if (!meets(i)) continue;
        const vf x = PART ? load_n(at + i * t.step, t.n) : load(at + i * t.step);
#pragma GCC unroll 2
        for (int o = FIRST; o < LAST; ++o) acc[o][i] = fma(x, w[o], acc[o][i]);
      }
    };
    if (last - first == PX)
      run([](int) { return true; });
    else
      run([&](int i) { return i >= first && i < last; });
  }
}

template <int PX, bool PART>
void depthwise_tile(const DepthwiseTile& t) {
  const vf bias = t.bias ? load_channels(t.bias, t.n) : zero();
  vf acc[2][PX];
#pragma GCC unroll 32
  for (int i = 0; i < 2 * PX; ++i) acc[i / PX][i % PX] = bias;
  for (int l = 0; l < t.rows; ++l) {
    const float* weights[2];
    bool meets[2];
    for (int o = 0; o < 2; ++o) {
      const int r = t.kernel_row[o] + l;
      meets[o] = o < t.out_rows && r >= 0 && r < t.R;
      weights[o] = meets[o] ? t.weights + r * t.S * kLanes : nullptr;
    }
    const float* at = t.x + l * t.row;
    if (meets[0] && meets[1])
      depthwise_row<PX, 0, 2, PART>(t, at, weights, acc);
    else if (meets[0])
      depthwise_row<PX, 0, 1, PART>(t, at, weights, acc);
    else if (meets[1])
      depthwise_row<PX, 1, 2, PART>(t, at, weights, acc);
  }
#pragma GCC unroll 2
  for (int o = 0; o < 2; ++o) {
    if (o == t.out_rows) break;
#pragma GCC unroll 16
    for (int i = 0; i < PX; ++i) {
      const vf y = t.relu ? max(zero(), acc[o][i]) : acc[o][i];
      float* to = t.out + o * t.out_row + i * t.out_column;
      if (t.streams)
        stream(to, y);
      else
        store_channels(to, y, PART ? t.n : kLanes);
    }
  }
}

using DepthwiseTileFn = void (*)(const DepthwiseTile&);

template <bool PART, int... PX>
DepthwiseTileFn tile_of(int64_t pixels, std::integer_sequence<int, PX...>) {
  static constexpr DepthwiseTileFn table[] = {depthwise_tile<PX + 1, PART>...};
  return table[pixels - 1];
}

DepthwiseTileFn tile_for(int64_t pixels, bool part) {
  using Widths = std::make_integer_sequence<int, kWidth>;
  return part ? tile_of<true>(pixels, Widths()) : tile_of<false>(pixels, Widths());
}

// Bytes of x and y of an image.
int64_t image_bytes(const ConvSizes& s) { return 4 * s.C * (s.Y * s.X + s.conv_y * s.conv_x); }

class DepthwiseRows {
 public:
  explicit DepthwiseRows(const ConvForward& args)
      : args_(args), s_(args.sizes), pool_(pool_kind(s_) == 2) {
    in_place_ = args.y.c == 1 && !pool_ && (!args.residual.data || args.residual.c == 1);
    if (in_place_) finish_ = finish_after_tile(args);
    streams_ = in_place_ && !finish_ && s_.K % kLanes == 0 && args.y.x % kLanes == 0 &&
               reinterpret_cast<uintptr_t>(args.y.data) % (4 * kLanes) == 0 &&
               s_.B * image_bytes(s_) >= kStreamBytes;
    // Strides take so much of x for a tile that fetching it meanwhile holds the tile up.
    fetches_ = s_.stride_y == 1 && s_.stride_x == 1 && args.x.y == s_.X * args.x.x;
    width_ = pool_ ? 2 * s_.out_x : s_.conv_x;
    tiles_ = (width_ + kWidth - 1) / kWidth;
  }

  int64_t pairs() const { return pool_ ? s_.out_y : (s_.conv_y + 1) / 2; }

  // Pairs of rows [first, last) of the convolution of image b.
  void pairs(int64_t b, int64_t first, int64_t last) const {
    const int64_t pool = pool_ ? 2 : 1, blocks = (s_.K + kLanes - 1) / kLanes;
    const Scratch memory(sizeof(float) * (2 * kWidth * kLanes + staged_floats(s_, 2, kWidth)));
    float* sums = memory.as<float>();
    float* staged = sums + 2 * kWidth * kLanes;
    for (int64_t y = 2 * first; y < 2 * last; y += 2) {
      const int64_t end_y = std::min(s_.conv_y, y + 2), met = end_row(y + 1);
      const int64_t next = fetches_ && y + 2 < 2 * last ? end_row(y + 3) : met;
      if (y == 2 * first || !fetches_)
        touch_rows(args_.x, s_, b, y == 2 * first ? first_row(y) : end_row(y - 1), met);
      Ahead ahead(args_.x.at(b, 0, met, 0), args_.x.at(b, 0, next, 0), tiles_ * blocks);
      for (int64_t i = 0; i < tiles_; ++i) {
        const int64_t x = begin(i), end_x = begin(i + 1);
        DepthwiseTile t = tile(b, y, end_y, x, end_x);
        if (!in_place_) t.out = sums;
        const DepthwiseTileFn whole = tile_for(end_x - x, false), part = tile_for(end_x - x, true);
        for (int64_t k = 0; k < s_.K; k += kLanes) {
          t.n = static_cast<int>(std::min<int64_t>(kLanes, s_.K - k));
          ahead.fetch();
          (t.n == kLanes ? whole : part)(t);
          t.x += kLanes;
          t.weights += kLanes * s_.R * s_.S;
          if (in_place_) {
            t.out += kLanes;
            if (t.bias) t.bias += kLanes;
          } else {
            finish(args_, b, k, t.n, {sums, kWidth * kLanes, kLanes, y, x}, end_y, end_x, y / pool,
                   end_y / pool, x / pool, end_x / pool, staged);
          }
        }
        for (int64_t row = y; finish_ && row < end_y; ++row)
          finish_(channels_run(args_, b, 0, s_.K, row, x, end_x));
      }
    }
    if (streams_) stream_end();
  }

 private:
  // Of tile i: even shares of a row, or pairs of its pixels for a pool.
  int64_t begin(int64_t i) const {
    return pool_ ? std::min(width_, i * kWidth) : i * width_ / tiles_;
  }

  int64_t first_row(int64_t y) const {
    return std::clamp<int64_t>(y * s_.stride_y - s_.top, 0, s_.Y);
  }

  // Past the last row of x that row y of the convolution meets.
  int64_t end_row(int64_t y) const {
    return std::clamp<int64_t>(y * s_.stride_y - s_.top + s_.R, 0, s_.Y);
  }

  // Of the first block of channels.
  DepthwiseTile tile(int64_t b, int64_t y, int64_t end_y, int64_t x, int64_t end_x) const {
    const int64_t left = x * s_.stride_x - s_.left;
    const int64_t bottom = (end_y - 1) * s_.stride_y - s_.top + s_.R;
    DepthwiseTile t{};
    t.x = args_.x.at(b, 0, first_row(y), left);
    t.weights = args_.packed;
    if (in_place_) {
      t.bias = args_.bias;
      t.out = args_.y.at(b, 0, y, x);
    }
    t.row = args_.x.y;
    t.tap = args_.x.x;
    t.step = s_.stride_x * args_.x.x;
    t.rows = static_cast<int>(std::min(s_.Y, bottom) - first_row(y));
    for (int o = 0; o < 2; ++o)
      t.kernel_row[o] = static_cast<int>(first_row(y) - ((y + o) * s_.stride_y - s_.top));
    t.R = static_cast<int>(s_.R);
    t.S = static_cast<int>(s_.S);
    t.left = left;
    t.stride = s_.stride_x;
    t.X = s_.X;
    t.inside = left >= 0 && (end_x - 1) * s_.stride_x - s_.left + s_.S <= s_.X;
    t.streams = streams_;
    t.relu = in_place_ && !finish_ && s_.activation == Activation::kRelu;
    t.out_row = in_place_ ? args_.y.y : kWidth * kLanes;
    t.out_column = in_place_ ? args_.y.x : kLanes;
    t.out_rows = static_cast<int>(end_y - y);
    return t;
  }

  const ConvForward& args_;
  const ConvSizes& s_;
  bool pool_, in_place_, streams_, fetches_;
  FinishRunFn finish_ = nullptr;  // of sums in y, all channels of some pixels
  int64_t width_, tiles_;
};

// Kernel rows [first, last) that meet the picture in row y of the convolution.
struct KernelRows {
  int64_t first, last;
  KernelRows(const ConvSizes& s, int64_t y) {
    const int64_t top = y * s.stride_y - s.top;
    first = std::clamp<int64_t>(-top, 0, s.R);
    last = std::clamp<int64_t>(s.Y - top, first, s.R);
  }
};

// sums [RR][S][kLanes] += over n pixels of grad times the inputs of RR rows of the kernel.
template <int S, int RR>
void depthwise_products(int64_t n, const float* x, int64_t row, int64_t column, int64_t step,
                        const float* grad, int64_t grad_step, float* sums) {
  vf acc[RR][S] = {};
  for (int64_t p = 0; p < n; ++p, x += step, grad += grad_step) {
    const vf g = load(grad);
#pragma GCC unroll 4
    for (int r = 0; r < RR; ++r)
#pragma GCC unroll 7
      for (int s = 0; s < S; ++s) acc[r][s] = fma(load(x + r * row + s * column), g, acc[r][s]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < RR; ++r)
#pragma GCC unroll 7
    for (int s = 0; s < S; ++s) {
      float* at = sums + (r * S + s) * kLanes;
      store(at, load(at) + acc[r][s]);
    }
}

class RowsGradient {
 public:
  RowsGradient(const ConvBackward& args, const float* grad_z)
      : args_(args), s_(args.sizes), padded_(padded_channels(s_.K)), grad_z_(grad_z) {
    // Pixels [inner0_, inner1_) meet no column outside of the picture.
    inner0_ = std::clamp<int64_t>((s_.left + s_.stride_x - 1) / s_.stride_x, 0, s_.conv_x);
    const int64_t last = s_.X - s_.S + s_.left;  // first column of the last such pixel
    inner1_ = std::clamp<int64_t>(last < 0 ? 0 : last / s_.stride_x + 1, inner0_, s_.conv_x);
  }

  // Adds row y of image b to sums [block][R S][kLanes].
  void row(int64_t b, int64_t y, float* sums) const {
    const KernelRows kernel(s_, y);
    if (kernel.first == kernel.last) return;                      // in the padding
    const int64_t last = y * s_.stride_y - s_.top + kernel.last;  // one past, of x
    touch_rows(args_.x, s_, b, std::max<int64_t>(0, last - s_.stride_y), last);
    touch(grad(b, y, 0, 0), s_.conv_x * padded_);
    for (int64_t x = 0; x < s_.conv_x; x += kRun)
      for (int64_t block = 0; block * kLanes < s_.K; ++block) {
        float* sum = sums + block * s_.R * s_.S * kLanes;
        const int64_t end = std::min(s_.conv_x, x + kRun);
        // A last vector of fewer channels would read another pixel's, or past the end.
        const bool whole = (block + 1) * kLanes <= s_.K;
        const int64_t i0 = whole ? std::clamp(inner0_, x, end) : end;
        const int64_t i1 = whole ? std::clamp(inner1_, i0, end) : end;
        edge(b, y, block, kernel, x, i0, sum);
        if (i0 < i1) inner(b, y, block, kernel, i0, i1, sum);
        edge(b, y, block, kernel, i1, end, sum);
      }
  }

 private:
  const float* grad(int64_t b, int64_t y, int64_t x, int64_t block) const {
    return grad_z_ + ((b * s_.conv_y + y) * s_.conv_x + x) * padded_ + block * kLanes;
  }
  const float* input(int64_t b, int64_t y, int64_t x, int64_t block, int64_t r) const {
    return args_.x.at(b, block * kLanes, y * s_.stride_y - s_.top + r, x * s_.stride_x - s_.left);
  }

  void edge(int64_t b, int64_t y, int64_t block, const KernelRows& kernel, int64_t x0, int64_t x1,
            float* sum) const {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, s_.K - block * kLanes));
    for (int64_t x = x0; x < x1; ++x) {
      const vf g = load(grad(b, y, x, block));
      const int64_t left = x * s_.stride_x - s_.left;
      for (int64_t r = kernel.first; r < kernel.last; ++r)
        for (int64_t s = std::max<int64_t>(0, -left); s < std::min(s_.S, s_.X - left); ++s) {
          float* at = sum + (r * s_.S + s) * kLanes;
          const float* from = input(b, y, x, block, r) + s * args_.x.x;
          store(at, fma(load_channels(from, n), g, load(at)));
        }
    }
  }

  void inner(int64_t b, int64_t y, int64_t block, const KernelRows& kernel, int64_t x0, int64_t x1,
             float* sum) const {
    switch (s_.S) {
      case 3: return products<3>(b, y, block, kernel, x0, x1, sum);
      case 5: return products<5>(b, y, block, kernel, x0, x1, sum);
      default: return products<7>(b, y, block, kernel, x0, x1, sum);
    }
  }

  template <int S>
  void products(int64_t b, int64_t y, int64_t block, const KernelRows& kernel, int64_t x0,
                int64_t x1, float* sum) const {
    constexpr int kAtOnce = kLanes == 16 || S == 3 ? 3 : (S == 5 ? 2 : 1);
    for (int64_t r = kernel.first; r < kernel.last;) {
      const auto run = [&](auto rows) {
        depthwise_products<S, decltype(rows)::value>(
            x1 - x0, input(b, y, x0, block, r), args_.x.y, args_.x.x, s_.stride_x * args_.x.x,
            grad(b, y, x0, block), padded_, sum + r * S * kLanes);
        r += decltype(rows)::value;
      };
      if (kernel.last - r >= kAtOnce)
        run(std::integral_constant<int, kAtOnce>());
      else
        run(std::integral_constant<int, 1>());
    }
  }

  const ConvBackward& args_;
  const ConvSizes& s_;
  int64_t padded_, inner0_, inner1_;
  const float* grad_z_;
};

bool kernel_fits(const ConvSizes& s) {
  return (s.S == 3 || s.S == 5 || s.S == 7) && s.stride_x <= 2 && s.dilation_x == 1 &&
         s.dilation_y == 1;
}

}  // namespace

bool depthwise_rows_fit(const ConvForward& args) {
  return kernel_fits(args.sizes) && args.x.c == 1 && pool_kind(args.sizes) != 1;
}

bool depthwise_rows_stream(const ConvSizes& s) {
  return s.R * s.S <= 9 && image_bytes(s) >= kImageBytes;
}

void depthwise_rows_forward(const ConvForward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  const DepthwiseRows rows(args);
  const int64_t pairs = rows.pairs(), wanted = s.B * pairs / (kTasks * num_threads);
  const int64_t size = std::clamp<int64_t>(wanted, std::min<int64_t>(2, pairs), pairs);
  const int64_t cuts = (pairs + size - 1) / size;
  const int64_t work = s.B * s.K * s.conv_y * s.conv_x * s.R * s.S;
  // Below half a million multiply-adds a second thread costs more than it brings.
  parallel_for(work < 500000 ? 1 : num_threads, s.B * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % cuts * size;
      rows.pairs(i / cuts, first, std::min(pairs, first + size));
    }
  });
}

bool depthwise_rows_fit(const ConvBackward& args) {
  return kernel_fits(args.sizes) && args.x.c == 1;
}

// Parts of the rows have sums of their own, added in order.
void depthwise_rows_grad_weight(const ConvBackward& args, const float* grad_z, int num_threads) {
  const ConvSizes& s = args.sizes;
  const int64_t taps = s.R * s.S, floats = padded_channels(s.K) * taps, rows = s.B * s.conv_y;
  const int64_t fitting = std::max<int64_t>(1, kPartBytes / 4 / floats);
  const int64_t parts = std::max<int64_t>(1, std::min({rows, kParts, fitting}));
  const Scratch memory(sizeof(float) * floats * parts);
  float* sums = memory.as<float>();
  const RowsGradient gradient(args, grad_z);
  parallel_for(num_threads, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      std::fill_n(sums + part * floats, floats, 0.0f);
      for (int64_t i = part * rows / parts; i < (part + 1) * rows / parts; ++i)
        gradient.row(i / s.conv_y, i % s.conv_y, sums + part * floats);
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < floats; ++i) sums[i] += sums[part * floats + i];
  for (int64_t c = 0; c < s.C; ++c)
    for (int64_t i = 0; i < taps; ++i)
      args.grad_weight[c * taps + i] = sums[(c / kLanes * taps + i) * kLanes + c % kLanes];
}

}  // namespace mbm::MBM_ISA
