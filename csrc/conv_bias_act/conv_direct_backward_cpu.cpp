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
          pack_strip(s, args.x, plan, b, g, y0, strip);
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int vectors = vectors_of(outputs - panel * kPanel);
            const float* columns = grad_z + g * outputs + panel * kPanel;
            float* to = sum + (g * panels + panel) * sequence * kPanel;
            for (const Segment& segment : plan.segments) {
              const RowTiles tiles(segment.depth);
              for (int64_t i = 0; i < tiles.tiles; ++i)
                outer_micro_for(tiles.size(i), vectors)(
                    y1 - y0, s.conv_x, strip + segment.offset + tiles.begin(i), plan.step,
                    s.stride_y * plan.row, columns, padded, s.conv_x * padded,
                    to + tiles.begin(i) * kPanel, true);
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
  const int64_t width = plan.channels <= kFewChannels ? plan.channels : kLanes;
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t k = 0; k < outputs; ++k) {
      const float* from = sums + (g * panels + k / kPanel) * sequence * kPanel + k % kPanel;
      float* to = args.grad_weight + (g * outputs + k) * sequence;
      for (int64_t r = 0; r < s.R; ++r)
        for (int64_t c0 = 0; c0 < plan.channels; c0 += width)
          for (int64_t t = 0; t < s.S; ++t)
            for (int64_t c = c0; c < std::min(plan.channels, c0 + width); ++c, from += kPanel)
              to[(c * s.R + r) * s.S + t] = *from;
    }
}

bool few_channels_fit(const ConvSizes& s) {
  return s.groups == 1 && s.C <= kFewChannels && s.stride_y == 1 && s.stride_x == 1 &&
         s.top <= (s.R - 1) * s.dilation_y && s.left <= (s.S - 1) * s.dilation_x;
}

namespace {

constexpr int kPixels = kLanes / 4;  // of a register tile: kPixels * C <= kLanes sums over K

// Pixels of one row; grad: the pixel that tap (R - 1, S - 1) meets at the first of them.
template <int C>
void few_channels_row(const ConvSizes& s, const float* grad, int64_t row, int64_t padded,
                      const float* weights, int64_t count, float* out, int64_t step_x,
                      int64_t step_c) {
  for (int64_t x = 0; x < count; x += kPixels, grad += kPixels * padded) {
    vf sums[kLanes] = {};
    const float* w = weights;
    for (int64_t r = 0; r < s.R; ++r)
      for (int64_t t = 0; t < s.S; ++t) {
        const float* g = grad + r * s.dilation_y * row + t * s.dilation_x * padded;
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

}  // namespace

// grad_x for 1 to 4 channels: lanes run over K and are added up at the end.
void few_channels_grad_x(const ConvBackward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  const GradZ grad(args);
  const int64_t padded = grad.padded();
  const Scratch memory(sizeof(float) * s.R * s.S * s.C * padded);
  float* weights = memory.as<float>();  // [R, S, K / kLanes, C, kLanes], turned
  std::fill_n(weights, s.R * s.S * s.C * padded, 0.0f);
  const bool few = s.K <= kFewChannels;  // as conv_pack saw it, K being its channels
  const float* from = args.packed;
  for (int64_t r = 0; r < s.R; ++r)
    for (int64_t k0 = 0; k0 < s.K; k0 += few ? s.K : kLanes)
      for (int64_t t = 0; t < s.S; ++t)
        for (int64_t k = k0; k < std::min(s.K, k0 + (few ? s.K : kLanes)); ++k, from += kPanel)
          for (int64_t c = 0; c < s.C; ++c)
            weights[(((r * s.S + t) * (padded / kLanes) + k / kLanes) * s.C + c) * kLanes +
                    k % kLanes] = from[c];
  const int64_t above = (s.R - 1) * s.dilation_y - s.top, reach = (s.R - 1) * s.dilation_y;
  const int64_t left = (s.S - 1) * s.dilation_x - s.left;
  const int64_t width = s.X + (s.S - 1) * s.dilation_x + kPixels;  // a last tile may read further
  const int64_t most = kTaskBytes / (4 * width * padded) / 2 * 2;
  const int64_t size = std::clamp<int64_t>(most, 4, 16);
  const int64_t cuts = (s.Y + size - 1) / size;
  parallel_for(num_threads, s.B * cuts, 1, [&](int64_t begin, int64_t end) {
    const Scratch own(sizeof(float) * ((size + reach) * width * padded + grad.staged()));
    float* rows = own.as<float>();
    float* stage = rows + (size + reach) * width * padded;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / cuts, y0 = i % cuts * size, y1 = std::min(s.Y, y0 + size);
      // Rows of grad_z, with zeros around, from y0 - above on.
      const int64_t top = y0 - above, bottom = y1 + reach - above;
      const int64_t r0 = std::clamp<int64_t>(top, 0, s.conv_y);
      const int64_t r1 = std::clamp<int64_t>(bottom, r0, s.conv_y);
      for (int64_t y = top; y < bottom; ++y) {
        float* row = rows + (y - top) * width * padded;
        const bool inside = y >= r0 && y < r1;
        std::fill_n(row, (inside ? left : width) * padded, 0.0f);
        const int64_t used = left + s.conv_x;
        if (inside && used < width) std::fill_n(row + used * padded, (width - used) * padded, 0.0f);
      }
      if (r0 < r1)
        grad.rows(b, r0, r1, {rows + left * padded, width * padded, padded, top}, nullptr, stage);
      for (int64_t y = y0; y < y1; ++y) {
        const float* at = rows + (y - y0) * width * padded;
        float* out = args.grad_x.at(b, 0, y, 0);
        const auto run = [&](auto channels) {
          few_channels_row<decltype(channels)::value>(s, at, width * padded, padded, weights, s.X,
                                                      out, args.grad_x.x, args.grad_x.c);
        };
        switch (s.C) {
          case 1: run(std::integral_constant<int, 1>()); break;
          case 2: run(std::integral_constant<int, 2>()); break;
          case 3: run(std::integral_constant<int, 3>()); break;
          default: run(std::integral_constant<int, 4>());
        }
      }
    }
  });
}

}  // namespace mbm::MBM_ISA
