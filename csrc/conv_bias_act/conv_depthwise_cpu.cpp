// Depthwise convolution (groups = C = K): lanes are channels, and a register tile is a run of
// pixels whose inputs come straight from the strip.
#include "conv_bias_act/conv_epilogue.h"
#include "conv_bias_act/conv_grad_z.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_strip.h"

namespace mbm::MBM_ISA {

bool depthwise_fits(int64_t C, int64_t K, int64_t groups) {
  return groups == C && C == K && C > kFewChannels;
}

// [block][R S][kLanes]
int64_t depthwise_packed_size(const ConvWeight& w) { return padded_channels(w.C) * w.R * w.S; }

void depthwise_pack(const ConvWeight& weight, bool transposed, float* packed) {
  const int64_t taps = weight.R * weight.S;
  std::fill_n(packed, depthwise_packed_size(weight), 0.0f);
  const int64_t first = transposed ? (taps - 1) * weight.tap_step : 0;
  const int64_t step = transposed ? -weight.tap_step : weight.tap_step;
  for (int64_t c = 0; c < weight.C; ++c) {
    const float* from = weight.data + c * weight.k_step + first;
    float* to = packed + c / kLanes * taps * kLanes + c % kLanes;
    for (int64_t i = 0; i < taps; ++i) to[i * kLanes] = from[i * step];
  }
}

namespace {

constexpr int64_t kStripBytes = 256 << 10;
constexpr int64_t kPartBytes = 32 << 20;
constexpr int64_t kParts = 16;
constexpr int kTapsAtOnce = 4;  // of a row of the kernel, in the weight's gradient

// The strip holds all channels.
ConvSizes one_group(ConvSizes s) {
  s.groups = 1;
  return s;
}

int64_t rows_that_fit(const ConvSizes& s, int64_t wanted) {
  const StripPlan one(one_group(s), 1);
  const int64_t row = one.down * one.blocks * s.pool_stride_y;
  return std::clamp<int64_t>(kStripBytes / 4 / row, std::min<int64_t>(wanted, s.R + 1), wanted);
}

// PX pixels of one row, one block of channels; taps: offsets of their inputs from `strip`.
template <int PX>
void depthwise_micro(const std::vector<int64_t>& taps, const float* strip, int64_t step,
                     const float* weights, float* out) {
  vf acc[PX] = {};
  for (const int64_t offset : taps) {
    const vf w = load(weights);
    weights += kLanes;
    const float* at = strip + offset;
#pragma GCC unroll 16
    for (int i = 0; i < PX; ++i) acc[i] = fma(load(at + i * step), w, acc[i]);
  }
  for (int i = 0; i < PX; ++i) store(out + i * kLanes, acc[i]);
}

// sums[NT, kLanes] += over a row of n pixels of grad_z times the inputs of NT neighbouring taps.
template <int NT>
void depthwise_outer(int64_t n, const float* strip, int64_t step, int64_t tap, const float* grad,
                     int64_t grad_step, float* sums) {
  vf acc[NT] = {};
  for (int64_t p = 0; p < n; ++p, strip += step, grad += grad_step) {
    const vf g = load(grad);
#pragma GCC unroll 4
    for (int i = 0; i < NT; ++i) acc[i] = fma(load(strip + i * tap), g, acc[i]);
  }
  for (int i = 0; i < NT; ++i) store(sums + i * kLanes, load(sums + i * kLanes) + acc[i]);
}

class Depthwise {
 public:
  Depthwise(const ConvForward& args, int64_t out_rows)
      : args_(args),
        s_(args.sizes),
        one_(one_group(s_)),
        plan_(one_, (out_rows - 1) * s_.pool_stride_y + s_.pool_y) {
    for (int64_t r = 0; r < s_.R; ++r)
      for (int64_t t = 0; t < s_.S; ++t) taps_.push_back(r * plan_.tap_down + t * plan_.tap_step);
  }

  // Rows [p0, p1) of the output of image b.
  void rows(int64_t b, int64_t p0, int64_t p1) const {
    const int64_t y0 = std::max<int64_t>(0, p0 * s_.pool_stride_y - s_.pool_top);
    const int64_t y1 = std::min(s_.conv_y, (p1 - 1) * s_.pool_stride_y - s_.pool_top + s_.pool_y);
    const int64_t sum_row = plan_.tiles_across * kMaxRows * kLanes;
    // A row of the output at a time where rows use rows of the convolution apart from one another.
    const bool apart = pool_kind(s_) != 1;
    const int64_t height = apart ? s_.pool_y : (p1 - p0 - 1) * s_.pool_stride_y + s_.pool_y;
    const Scratch memory(
        sizeof(float) * (plan_.floats() + height * sum_row + staged_floats(s_, height, s_.conv_x)));
    float* strip = memory.as<float>();
    float* sums = strip + plan_.floats();
    float* staged = sums + height * sum_row;
    pack_strip(one_, args_.x, plan_, b, 0, y0, strip);
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, s_.K - block * kLanes));
      const auto part = [&](int64_t from, int64_t to, int64_t first, int64_t last) {
        multiply(block, strip, y0, from, to, sum_row, sums);
        finish(args_, b, block * kLanes, n, {sums, sum_row, kLanes, from, 0}, to, s_.conv_x, first,
               last, 0, s_.out_x, staged);
      };
      if (!apart) part(y0, y1, p0, p1);
      for (int64_t p = p0; apart && p < p1; ++p) part(p * s_.pool_y, (p + 1) * s_.pool_y, p, p + 1);
    }
  }

 private:
  // Rows [y, y1) of the convolution; the strip begins at row y0.
  void multiply(int64_t block, const float* strip, int64_t y0, int64_t y, int64_t y1,
                int64_t sum_row, float* sums) const {
    const float* weights = args_.packed + block * s_.R * s_.S * kLanes;
    for (; y < y1; ++y, sums += sum_row)
      for (int64_t t = 0; t < plan_.tiles_across; ++t) {
        const float* at =
            strip + block * plan_.block + (y - y0) * plan_.down + t * kMaxRows * plan_.step;
        float* to = sums + t * kMaxRows * kLanes;
        if (s_.conv_x - t * kMaxRows <= kMaxRows / 2)
          depthwise_micro<kMaxRows / 2>(taps_, at, plan_.step, weights, to);
        else
          depthwise_micro<kMaxRows>(taps_, at, plan_.step, weights, to);
      }
  }

  const ConvForward& args_;
  const ConvSizes& s_;
  ConvSizes one_;
  StripPlan plan_;
  std::vector<int64_t> taps_;
};

}  // namespace

void depthwise_forward(const ConvForward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  if (s.B == 0 || s.out_y == 0 || s.out_x == 0) return;
  const bool rows = depthwise_rows_fit(args);
  if (group_strips_fit(args) && !(rows && depthwise_rows_stream(s)))
    return group_strips_forward(args, num_threads);
  if (rows) return depthwise_rows_forward(args, num_threads);
  const int64_t size = rows_that_fit(s, s.out_y), cuts = (s.out_y + size - 1) / size;
  const Depthwise depthwise(args, size);
  parallel_for(num_threads, s.B * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % cuts * size;
      depthwise.rows(i / cuts, p, std::min(s.out_y, p + size));
    }
  });
}

// grad_z is whole; parts of the rows have sums of their own, added in order.
void depthwise_grad_weight(const ConvBackward& args, const float* grad_z, int num_threads) {
  if (depthwise_rows_fit(args)) return depthwise_rows_grad_weight(args, grad_z, num_threads);
  const ConvSizes& s = args.sizes;
  const ConvSizes one = one_group(s);
  const int64_t padded = padded_channels(s.K), taps = s.R * s.S;
  const int64_t height = rows_that_fit(s, s.conv_y), cuts = (s.conv_y + height - 1) / height;
  const int64_t tasks = s.B * cuts, floats = padded * taps;
  const int64_t fitting = std::max<int64_t>(1, kPartBytes / 4 / floats);
  const int64_t parts = std::max<int64_t>(1, std::min({tasks, kParts, fitting}));
  const StripPlan plan(one, height);
  const Scratch memory(sizeof(float) * floats * parts);
  float* sums = memory.as<float>();
  parallel_for(num_threads, parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch own(sizeof(float) * plan.floats());
    float* strip = own.as<float>();
    for (int64_t part = begin; part < end; ++part) {
      float* sum = sums + part * floats;
      std::fill_n(sum, floats, 0.0f);
      for (int64_t i = part * tasks / parts; i < (part + 1) * tasks / parts; ++i) {
        const int64_t b = i / cuts, y0 = i % cuts * height, y1 = std::min(s.conv_y, y0 + height);
        pack_strip(one, args.x, plan, b, 0, y0, strip);
        for (int64_t block = 0; block < plan.blocks; ++block)
          for (int64_t y = y0; y < y1; ++y) {
            const float* grad = grad_z + (b * s.conv_y + y) * s.conv_x * padded + block * kLanes;
            for (int64_t r = 0; r < s.R; ++r) {
              const float* at =
                  strip + block * plan.block + (y - y0) * plan.down + r * plan.tap_down;
              const int64_t tap = plan.tap_step;
              float* to = sum + (block * taps + r * s.S) * kLanes;
              for (int64_t t = 0; t < s.S; t += kTapsAtOnce) {
                const auto run = [&](auto count) {
                  depthwise_outer<decltype(count)::value>(s.conv_x, at + t * tap, plan.step, tap,
                                                          grad, padded, to + t * kLanes);
                };
                switch (s.S - t) {
                  case 1: run(std::integral_constant<int, 1>()); break;
                  case 2: run(std::integral_constant<int, 2>()); break;
                  case 3: run(std::integral_constant<int, 3>()); break;
                  default: run(std::integral_constant<int, kTapsAtOnce>());
                }
              }
            }
          }
      }
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < floats; ++i) sums[i] += sums[part * floats + i];
  for (int64_t c = 0; c < s.C; ++c)
    for (int64_t i = 0; i < taps; ++i)
      args.grad_weight[c * taps + i] = sums[(c / kLanes * taps + i) * kLanes + c % kLanes];
}

}  // namespace mbm::MBM_ISA
