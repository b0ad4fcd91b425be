// The gradient of a strided convolution's x by the phases of the stride: pixels of x a whole stride
// apart meet the same taps, and their gradient is a convolution of grad_z with those, of stride 1.
#include <numeric>

#include "common/parallel.h"
#include "common/scratch.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_strip.h"

namespace mbm::MBM_ISA {
namespace {

// Taps `first`, first + step, ... of a kernel's side: those with tap * dilation = phase modulo
// stride. Their inputs in grad_z lie `dilation` apart.
struct PhaseTaps {
  int64_t first, step, count, dilation;

  PhaseTaps(int64_t phase, int64_t size, int64_t stride, int64_t spacing) {
    const int64_t common = std::gcd(spacing, stride);
    step = stride / common;
    dilation = spacing / common;
    first = 0;
    while (first < step && first * spacing % stride != phase) ++first;
    count = first < step && first < size ? (size - 1 - first) / step + 1 : 0;
  }
  int64_t last() const { return first + (count - 1) * step; }
};

// Pixels `first`, first + stride, ... of a side of x, `count` of them, meet the taps of `phase`.
struct PhasePixels {
  int64_t first, count;

  PhasePixels(int64_t phase, int64_t size, int64_t stride, int64_t before) {
    first = ((phase - before) % stride + stride) % stride;
    count = first < size ? (size - 1 - first) / stride + 1 : 0;
  }
};

void clear(const ConvMap<float>& to, const ConvSizes& s, int num_threads) {
  parallel_for(num_threads, s.B * s.conv_y, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t x = 0; x < s.conv_x; ++x) {
        float* at = to.at(i / s.conv_y, 0, i % s.conv_y, x);
        for (int64_t c = 0; c < s.K; ++c) at[c * to.c] = 0.0f;
      }
  });
}

// body(row's phase, column's phase, their taps, sizes of their weight, where it is packed)
template <class Body>
void each_phase(const ConvWeight& w, const ConvPacking& p, const Body& body) {
  int64_t at = 0;
  for (int64_t i = 0; i < p.stride_y; ++i)
    for (int64_t j = 0; j < p.stride_x; ++j) {
      const PhaseTaps rows(i, w.R, p.stride_y, p.dilation_y);
      const PhaseTaps columns(j, w.S, p.stride_x, p.dilation_x);
      ConvWeight part = w;
      part.R = rows.count;
      part.S = columns.count;
      body(i, j, rows, columns, part, at);
      if (part.R * part.S > 0) at += direct_packed_size(part, true);
    }
}

}  // namespace

bool phases_fit(int64_t C, int64_t K, int64_t groups, int64_t stride_y, int64_t stride_x) {
  return stride_y * stride_x > 1 && !depthwise_fits(C, K, groups) &&
         !(groups == 1 && C <= kFewChannels);
}

void phases_pack(const ConvWeight& weight, const ConvPacking& packing, float* packed,
                 int num_threads) {
  const int64_t channels = weight.C / weight.groups;
  const Scratch memory(sizeof(float) * weight.K * channels * weight.R * weight.S);
  float* taken = memory.as<float>();
  each_phase(weight, packing,
             [&](int64_t, int64_t, const PhaseTaps& rows, const PhaseTaps& columns, ConvWeight part,
                 int64_t at) {
               const int64_t taps = part.R * part.S;
               if (taps == 0) return;
               const int64_t across = columns.step * weight.tap_step;
               const int64_t down = rows.step * weight.S * weight.tap_step;
               const float* first =
                   weight.data + (rows.first * weight.S + columns.first) * weight.tap_step;
               float* to = taken;
               for (int64_t k = 0; k < weight.K; ++k)
                 for (int64_t c = 0; c < channels; ++c) {
                   const float* from = first + k * weight.k_step + c * weight.c_step;
                   for (int64_t r = 0; r < part.R; ++r, from += down)
                     for (int64_t s = 0; s < part.S; ++s) *to++ = from[s * across];
                 }
               part.data = taken;
               part.k_step = channels * taps;
               part.c_step = taps;
               part.tap_step = 1;
               direct_pack(part, true, packed + at, num_threads);
             });
}

void phases_grad_x(const ConvBackward& args, const ConvMap<const float>& grad_z, int num_threads) {
  const ConvSizes& s = args.sizes;
  const ConvMap<float>& grad_x = args.grad_x;
  const ConvWeight weight{s.K, s.C, s.R, s.S, s.groups, nullptr, 0, 0, 0};
  const ConvPacking packing{true, false, s.stride_y, s.stride_x, s.dilation_y, s.dilation_x};
  each_phase(weight, packing,
             [&](int64_t i, int64_t j, const PhaseTaps& rows, const PhaseTaps& columns,
                 const ConvWeight& part, int64_t at) {
               const PhasePixels down(i, s.Y, s.stride_y, s.top);
               const PhasePixels across(j, s.X, s.stride_x, s.left);
               ConvForward f{};
               f.y = {grad_x.at(0, 0, down.first, across.first), grad_x.b, grad_x.c,
                      grad_x.y * s.stride_y, grad_x.x * s.stride_x};
               f.sizes = {s.B, s.K, s.C, s.conv_y, s.conv_x, part.R, part.S, 1, 1,
                          // No remainder: these taps meet these pixels.
                          (rows.last() * s.dilation_y - down.first - s.top) / s.stride_y,
                          (columns.last() * s.dilation_x - across.first - s.left) / s.stride_x,
                          rows.dilation, columns.dilation, s.groups, down.count, across.count,
                          down.count, across.count, 1, 1, 1, 1, 0, 0, Activation::kNone};
               f.x = grad_z;
               f.packed = args.packed + at;
               if (part.R * part.S == 0)
                 clear(f.y, f.sizes, num_threads);
               else
                 conv_forward(f, false, num_threads);
             });
}

}  // namespace mbm::MBM_ISA
