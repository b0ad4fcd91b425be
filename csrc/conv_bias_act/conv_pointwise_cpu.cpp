// 1x1 convolution of stride 1 without padding or pool, channels_last throughout: the pixels of the
// batch are rows of a matrix [B Y X, C] that register tiles read where they lie.
#include "conv_bias_act/conv_epilogue.h"
#include "conv_bias_act/conv_micro.h"
#include "conv_bias_act/conv_plan.h"

namespace mbm::MBM_ISA {
namespace {

// Past this, kMaxRows rows a power of two apart would share too few sets of L1.
constexpr int64_t kMostChannels = 512;
constexpr int64_t kWeightBytes = 256 << 10;  // stay in L2 beside the pixels
constexpr int64_t kInL1 = 16 << 10, kInL2 = 128 << 10;
constexpr int64_t kMostTiles = 8;
constexpr int64_t kTasks = 64;  // wanted, so that threads end together

// Whether pixel i of the batch lies at i * map.x, its channels side by side.
template <class T>
bool flat(const ConvMap<T>& map, int64_t B, int64_t Y, int64_t X) {
  return map.c == 1 && (Y == 1 || map.y == X * map.x) && (B == 1 || map.b == Y * X * map.x);
}

class Pointwise {
 public:
  explicit Pointwise(const ConvForward& args)
      : args_(args),
        inputs_(args.sizes.C / args.sizes.groups),
        outputs_(args.sizes.K / args.sizes.groups),
        panels_(panels_of(outputs_)),
        pixels_(args.sizes.B * args.sizes.Y * args.sizes.X) {
    ConvSizes& s = args_.sizes;  // one row of pixels
    s.B = s.Y = s.conv_y = s.out_y = 1;
    s.X = s.conv_x = s.out_x = pixels_;
    const int64_t weights = panels_ * inputs_ * kPanel * 4, tile = kMaxRows * inputs_ * 4;
    const int64_t most = (weights > kWeightBytes ? kInL2 : kInL1) / tile;
    block_ = kMaxRows * std::clamp<int64_t>(most, 1, kMostTiles);
    const int64_t blocks = (pixels_ + block_ - 1) / block_;
    task_ = block_ * std::max<int64_t>(1, blocks / kTasks);
  }

  int64_t tasks() const { return (pixels_ + task_ - 1) / task_; }

  void task(int64_t i) const {
    const Scratch memory(sizeof(float) * (block_ * kPanel + kMaxRows * inputs_));
    float* sums = memory.as<float>();
    float* last = sums + block_ * kPanel;
    const int64_t end = std::min(pixels_, (i + 1) * task_);
    for (int64_t g = 0; g < args_.sizes.groups; ++g)
      for (int64_t q = i * task_; q < end; q += block_)
        block(g, q, std::min(end, q + block_), end, sums, last);
  }

 private:
  // Pixels [q0, q1), at most block_, of a task that ends at `end`.
  void block(int64_t g, int64_t q0, int64_t q1, int64_t end, float* sums, float* last) const {
    const ConvMap<const float>& x = args_.x;
    const float* from = x.at(0, g * inputs_, 0, q0);
    const int64_t whole = (q1 - q0) / kMaxRows * kMaxRows, rest = q1 - q0 - whole;
    for (int64_t i = 0; i < rest; ++i)
      std::copy_n(from + (whole + i) * x.x, inputs_, last + i * inputs_);
    if (rest > 0) std::fill_n(last + rest * inputs_, (kMaxRows - rest) * inputs_, 0.0f);
    const bool more = q1 + block_ <= end;
    const char* ahead = reinterpret_cast<const char*>(more ? from + block_ * x.x : from);
    const char* out = reinterpret_cast<const char*>(args_.y.at(0, g * outputs_, 0, more ? q1 : q0));
    const int64_t share = more ? kMaxRows * x.x * 4 / (panels_ * inputs_) : 0;
    const int64_t out_share = more ? kMaxRows * args_.y.x * 4 / (panels_ * inputs_) : 0;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const float* weights = args_.packed + (g * panels_ + panel) * inputs_ * kPanel;
      const int vectors = vectors_of(outputs_ - panel * kPanel);
      for (int64_t t = 0; t < q1 - q0; t += kMaxRows) {
        const bool copied = t >= whole;
        const Tile tile{copied ? last : from + t * x.x,
                        copied ? inputs_ : x.x,
                        weights,
                        sums + t * kPanel,
                        share,
                        out_share};
        if (vectors == 2)
          multiply<2>(tile, ahead, out);
        else
          multiply<1>(tile, ahead, out);
      }
      for (int half = 0; half < vectors; ++half) {
        const int64_t k = panel * kPanel + half * kLanes;
        finish(args_, 0, g * outputs_ + k,
               static_cast<int>(std::min<int64_t>(kLanes, outputs_ - k)),
               {sums + half * kLanes, 0, kPanel, 0, q0}, 1, q1, 0, 1, q0, q1, nullptr);
      }
    }
  }

  struct Tile {
    const float* x;
    int64_t step;
    const float* weights;
    float* sums;
    int64_t share, out_share;
  };

  // Fetches with each channel `share` bytes of the next block's x and `out_share` of its y: a burst
  // between the tiles took 30 % longer for 256 channels, y left out 15 % for 256 outputs.
  template <int NV>
  void multiply(const Tile& tile, const char*& ahead, const char*& out) const {
    const Segment all{0, inputs_};
    const char *in = ahead, *to = out;
    conv_sums<kMaxRows, NV, 0>(&all, 1, tile.x, tile.step, tile.weights, tile.sums, [&] {
      __builtin_prefetch(in);
      __builtin_prefetch(to, 1);
      in += tile.share;
      to += tile.out_share;
    });
    ahead = in;
    out = to;
  }

  ConvForward args_;
  int64_t inputs_, outputs_, panels_, pixels_, block_, task_;
};

}  // namespace

bool pointwise_fits(const ConvForward& args) {
  const ConvSizes& s = args.sizes;
  return s.R == 1 && s.S == 1 && s.stride_y == 1 && s.stride_x == 1 && s.top == 0 && s.left == 0 &&
         s.conv_y == s.Y && s.conv_x == s.X && pool_kind(s) == 0 &&
         s.C / s.groups <= kMostChannels && flat(args.x, s.B, s.Y, s.X) &&
         flat(args.y, s.B, s.Y, s.X) && (!args.residual.data || flat(args.residual, s.B, s.Y, s.X));
}

void pointwise_forward(const ConvForward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  const Pointwise pointwise(args);
  // Below half a million multiply-adds a second thread costs more than it brings.
  const int threads = s.B * s.Y * s.X * s.K * (s.C / s.groups) < 500000 ? 1 : num_threads;
  parallel_for(threads, pointwise.tasks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pointwise.task(i);
  });
}

}  // namespace mbm::MBM_ISA
