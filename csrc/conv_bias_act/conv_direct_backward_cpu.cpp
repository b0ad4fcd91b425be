// Gradients of a direct convolution: of the weight, and of an input of few channels.
#include "conv_bias_act/conv_grad_z.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_strip.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kTaskBytes = 256 << 10;  // grad_z of a task
constexpr int64_t kPartBytes = 32 << 20;   // partial sums of the weight's gradient
constexpr int64_t kParts = 16;

int64_t rows_of_task(const ConvSizes& s, int64_t padded) {
  const int64_t most = kTaskBytes / (4 * s.conv_x * padded) / 2 * 2;
  return std::clamp<int64_t>(most, 2, std::max<int64_t>(2, (s.conv_y + 1) / 2 * 2));
}

}  // namespace

// Part i of the tasks adds to its own copy; the copies are added in order.
void direct_grad_weight(const ConvBackward& args, const float* whole, int num_threads) {
  const ConvSizes& s = args.sizes;
  const GradZ grad(args);
  const int64_t padded = grad.padded(), height = rows_of_task(s, padded);
  const int64_t cuts = (s.conv_y + height - 1) / height, tasks = s.B * cuts;
  const StripPlan plan(s, height);
  // A 1x1 kernel without padding reads its pixels where they lie.
  const bool in_place = s.R == 1 && s.S == 1 && s.top == 0 && s.left == 0 && args.x.c == 1 &&
                        (s.conv_y - 1) * s.stride_y < s.Y && (s.conv_x - 1) * s.stride_x < s.X;
  const int64_t step = in_place ? s.stride_x * args.x.x : plan.step;
  const int64_t row = in_place ? s.stride_y * args.x.y : plan.down;
  const int64_t outputs = s.K / s.groups, panels = panels_of(outputs);
  const int64_t sequence = plan.channels * s.R * s.S;  // packed rows of a panel
  const int64_t weights = args.grad_weight ? s.groups * panels * sequence * kPanel : 0;
  const int64_t part_floats = weights + padded;
  const int64_t fitting = std::max<int64_t>(1, kPartBytes / 4 / part_floats);
  const int64_t parts = std::max<int64_t>(1, std::min({tasks, kParts, fitting}));
  const Scratch memory(sizeof(float) * part_floats * parts);
  float* sums = memory.as<float>();
  parallel_for(num_threads, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t local = whole ? 0 : height * s.conv_x * padded + 2 * kLanes;
    const Scratch own(sizeof(float) * (plan.floats() + local + grad.staged()));
    float* strip = own.as<float>();
    float* rows = strip + plan.floats();
    float* stage = rows + local;
    for (int64_t part = begin; part < end; ++part) {
      float* sum = sums + part * part_floats;
      std::fill_n(sum, part_floats, 0.0f);
      for (int64_t t = part * tasks / parts; t < (part + 1) * tasks / parts; ++t) {
        const int64_t b = t / cuts, y0 = t % cuts * height, y1 = std::min(s.conv_y, y0 + height);
        const float* grad_z = rows;
        if (whole)
          grad_z = whole + (b * s.conv_y + y0) * s.conv_x * padded;
        else
          grad.rows(b, y0, y1, {rows, s.conv_x * padded, padded, y0},
                    args.grad_bias ? sum + weights : nullptr, stage);
        if (!args.grad_weight) continue;
        for (int64_t g = 0; g < s.groups; ++g) {
          if (!in_place) pack_strip(s, args.x, plan, b, g, y0, strip);
          const float* x = in_place ? args.x.at(b, g * plan.channels, y0 * s.stride_y, 0) : strip;
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int vectors = vectors_of(outputs - panel * kPanel);
            const float* columns = grad_z + g * outputs + panel * kPanel;
            float* to = sum + (g * panels + panel) * sequence * kPanel;
            for (size_t j = 0; j < plan.segments.size(); ++j) {
              const Segment& segment = plan.segments[j];
              const RowTiles tiles(segment.depth);
              const float* from =
                  x + (in_place ? static_cast<int64_t>(j) * kLanes : segment.offset);
              for (int64_t i = 0; i < tiles.tiles; ++i)
                outer_micro_for(tiles.size(i), vectors)(
                    y1 - y0, s.conv_x, from + tiles.begin(i), step, row, columns, padded,
                    s.conv_x * padded, to + tiles.begin(i) * kPanel, true);
              to += segment.depth * kPanel;
            }
          }
        }
      }
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < part_floats; ++i) sums[i] += sums[part * part_floats + i];
  if (args.grad_bias) std::copy_n(sums + weights, s.K, args.grad_bias);
  if (!args.grad_weight) return;
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t k = 0; k < outputs; ++k) {
      const float* from = sums + (g * panels + k / kPanel) * sequence * kPanel + k % kPanel;
      float* to = args.grad_weight + (g * outputs + k) * sequence;
      for (int64_t tap = 0; tap < s.R * s.S; ++tap)
        for (int64_t c = 0; c < plan.channels; ++c, from += kPanel) to[c * s.R * s.S + tap] = *from;
    }
}

bool few_channels_fit(const ConvSizes& s) { return s.groups == 1 && s.C <= kFewChannels; }

namespace {

constexpr int kPixels = kLanes / 4;  // of a register tile: kPixels * C <= kLanes sums over K

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// What one tap adds: the pixel of grad_z at `offset` times weights [K / kLanes, C, kLanes].
struct Tap {
  int64_t offset;
  const float* weights;
};

// `count` pixels of grad_x, step_x apart; the pixels of grad_z that they meet lie side by side.
template <int C>
void few_channels_row(const std::vector<Tap>& taps, const float* grad, int64_t padded,
                      int64_t count, float* out, int64_t step_x, int64_t step_c) {
  for (int64_t x = 0; x < count; x += kPixels, grad += kPixels * padded) {
    vf sums[kLanes] = {};
    for (const Tap& tap : taps) {
      const float* g = grad + tap.offset;
      const float* w = tap.weights;
      for (int64_t k = 0; k < padded; k += kLanes, w += C * kLanes)
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i) {
          const vf gi = load(g + i * padded + k);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c)
            sums[i * C + c] = fma(gi, load(w + c * kLanes), sums[i * C + c]);
        }
    }
    const vf result = sum_rows(sums);
    const int n = static_cast<int>(std::min<int64_t>(kPixels, count - x));
    if (step_c == 1 && step_x == C) {
      store_channels(out + x * C, result, n * C);
    } else {
      alignas(64) float lanes[kLanes];
      store(lanes, result);
      for (int i = 0; i < n; ++i)
        for (int c = 0; c < C; ++c) out[(x + i) * step_x + c * step_c] = lanes[i * C + c];
    }
  }
}

// grad_x for 1 to 4 channels: lanes run over K and are added up at the end.
class FewChannels {
 public:
  explicit FewChannels(const ConvBackward& args)
      : args_(args),
        s_(args.sizes),
        grad_(args),
        padded_(grad_.padded()),
        reach_y_((s_.R - 1) * s_.dilation_y) {
    // A tap's pixels of grad_z lie side by side, at most `count` of them, some in the map: the
    // padding, however wide, adds no more than those around it. The last tile may read further.
    const int64_t count = (s_.X - 1) / s_.stride_x + 1;
    const int64_t first = floor_div(s_.left - (s_.S - 1) * s_.dilation_x, s_.stride_x);
    const int64_t met = floor_div(s_.X - 1 + s_.left, s_.stride_x) + 1;
    first_x_ = std::clamp<int64_t>(first, 1 - count, 0);
    width_ = std::clamp(met, s_.conv_x, s_.conv_x + count - 1) + kPixels - first_x_;
    const int64_t most = kTaskBytes / (4 * width_ * padded_) * s_.stride_y / 2 * 2;
    size_ = std::clamp<int64_t>(most, 4, 16);
    weights_.assign(s_.R * s_.S * s_.C * padded_, 0.0f);
    unpack();
  }

  int64_t size() const { return size_; }  // rows of a task

  // Rows [y0, y1) of image b.
  void rows(int64_t b, int64_t y0, int64_t y1) const {
    // Rows [r0, r1) of grad_z with zeros to their left and right.
    const int64_t top = floor_div(y0 + s_.top - reach_y_, s_.stride_y);
    const int64_t bottom = floor_div(y1 - 1 + s_.top, s_.stride_y) + 1;
    const int64_t r0 = std::clamp<int64_t>(top, 0, s_.conv_y);
    const int64_t r1 = std::clamp<int64_t>(bottom, r0, s_.conv_y);
    const int64_t row = width_ * padded_, border = -first_x_ * padded_;
    const Scratch own(sizeof(float) * ((r1 - r0) * row + grad_.staged()));
    float* data = own.as<float>();
    for (int64_t y = r0; y < r1; ++y) {
      float* at = data + (y - r0) * row;
      const int64_t end = border + s_.conv_x * padded_;
      std::fill_n(at, border, 0.0f);
      std::fill_n(at + end, row - end, 0.0f);
    }
    if (r0 < r1)
      grad_.rows(b, r0, r1, {data + border, row, padded_, r0}, nullptr, data + (r1 - r0) * row);
    std::vector<Tap> taps;
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t phase = 0; phase < std::min(s_.stride_x, s_.X); ++phase) {
        const int64_t count = (s_.X - phase + s_.stride_x - 1) / s_.stride_x;
        taps.clear();
        for (int64_t r = 0; r < s_.R; ++r)
          for (int64_t t = 0; t < s_.S; ++t) {
            const int64_t i = y + s_.top - r * s_.dilation_y;
            const int64_t j = phase + s_.left - t * s_.dilation_x;
            const int64_t p = floor_div(i, s_.stride_y), q = floor_div(j, s_.stride_x);
            const bool meets = p * s_.stride_y == i && q * s_.stride_x == j;
            if (meets && p >= r0 && p < r1 && q > -count && q < s_.conv_x)
              taps.push_back({(p - r0) * row + (q - first_x_) * padded_,
                              weights_.data() + (r * s_.S + t) * s_.C * padded_});
          }
        const auto run = [&](auto channels) {
          few_channels_row<decltype(channels)::value>(taps, data, padded_, count,
                                                      args_.grad_x.at(b, 0, y, phase),
                                                      args_.grad_x.x * s_.stride_x, args_.grad_x.c);
        };
        switch (s_.C) {
          case 1: run(std::integral_constant<int, 1>()); break;
          case 2: run(std::integral_constant<int, 2>()); break;
          case 3: run(std::integral_constant<int, 3>()); break;
          default: run(std::integral_constant<int, 4>());
        }
      }
  }

 private:
  // weights [R, S, K / kLanes, C, kLanes] from conv_pack's turned form, whose channels are K.
  void unpack() {
    const float* from = args_.packed;
    for (int64_t tap = s_.R * s_.S - 1; tap >= 0; --tap)
      for (int64_t k = 0; k < s_.K; ++k, from += kPanel)
        for (int64_t c = 0; c < s_.C; ++c)
          weights_[tap * s_.C * padded_ + (k / kLanes * s_.C + c) * kLanes + k % kLanes] = from[c];
  }

  const ConvBackward& args_;
  const ConvSizes& s_;
  GradZ grad_;
  int64_t padded_, reach_y_, first_x_, width_, size_;
  std::vector<float> weights_;
};

}  // namespace

void few_channels_grad_x(const ConvBackward& args, int num_threads) {
  const FewChannels few(args);
  const int64_t size = few.size(), cuts = (args.sizes.Y + size - 1) / size;
  parallel_for(num_threads, args.sizes.B * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y0 = i % cuts * size;
      few.rows(i / cuts, y0, std::min(args.sizes.Y, y0 + size));
    }
  });
}

}  // namespace mbm::MBM_ISA
