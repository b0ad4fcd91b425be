// The gradient of a strided convolution's x by the phases of the stride: pixels of x a whole stride
// apart meet the same taps, and their gradient is a convolution of grad_z with those, of stride 1.
#include <numeric>

#include "common/parallel.h"
#include "common/scratch.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_strip.h"

namespace mbm::MBM_ISA {
namespace {

// Taps `first`, first + step, ... of a kernel's side: they lie a multiple of the stride apart, and
// so meet the pixels of one phase. Their inputs in grad_z lie `dilation` apart.
struct PhaseTaps {
  int64_t first, step, count, dilation;

  PhaseTaps(int64_t first, int64_t size, int64_t stride, int64_t spacing) : first(first) {
    const int64_t common = std::gcd(spacing, stride);
    step = stride / common;
    dilation = spacing / common;
    count = (size - 1 - first) / step + 1;
  }
  int64_t last() const { return first + (count - 1) * step; }

  // Of a kernel's side; each begins with one of the first taps.
  static int64_t phases(int64_t size, int64_t stride, int64_t spacing) {
    return std::min(size, stride / std::gcd(spacing, stride));
  }
};

// Pixels `first`, first + stride, ... of a side of x, `count` of them, meet the tap `offset` pixels
// into the kernel.
struct PhasePixels {
  int64_t first, count;

  PhasePixels(int64_t offset, int64_t size, int64_t stride, int64_t before) {
    first = ((offset - before) % stride + stride) % stride;
    count = first < size ? (size - 1 - first) / stride + 1 : 0;
  }
};

void clear(const ConvMap<float>& to, const ConvSizes& s, int num_threads) {
  parallel_for(num_threads, s.B * s.Y, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / s.Y, y = i % s.Y;
      if (to.c == 1)
        for (int64_t x = 0; x < s.X; ++x) std::fill_n(to.at(b, 0, y, x), s.C, 0.0f);
      else
        for (int64_t c = 0; c < s.C; ++c) std::fill_n(to.at(b, c, y, 0), s.X, 0.0f);
    }
  });
}

// body(taps of rows, of columns, sizes of their weight, where it is packed)
template <class Body>
void each_phase(const ConvWeight& w, const ConvPacking& p, const Body& body) {
  const bool depthwise = depthwise_fits(w.C, w.K, w.groups);
  int64_t at = 0;
  for (int64_t r = 0; r < PhaseTaps::phases(w.R, p.stride_y, p.dilation_y); ++r)
    for (int64_t s = 0; s < PhaseTaps::phases(w.S, p.stride_x, p.dilation_x); ++s) {
      const PhaseTaps rows(r, w.R, p.stride_y, p.dilation_y);
      const PhaseTaps columns(s, w.S, p.stride_x, p.dilation_x);
      ConvWeight part = w;
      part.R = rows.count;
      part.S = columns.count;
      body(rows, columns, part, at);
      at += depthwise ? depthwise_packed_size(part) : direct_packed_size(part, true);
    }
}

}  // namespace

bool phases_fit(int64_t C, int64_t K, int64_t groups, const ConvPacking& p) {
  if (p.stride_y == 1 && p.stride_x == 1) return false;
  // A depthwise convolution's zeros between the pixels of grad_z are few unless it is dilated.
  if (depthwise_fits(C, K, groups)) return p.dilation_y > 1 || p.dilation_x > 1;
  return !(groups == 1 && C <= kFewChannels);
}

void phases_pack(const ConvWeight& weight, const ConvPacking& packing, float* packed,
                 int num_threads) {
  const int64_t channels = weight.C / weight.groups;
  const Scratch memory(sizeof(float) * weight.K * channels * weight.R * weight.S);
  float* taken = memory.as<float>();
  each_phase(weight, packing,
             [&](const PhaseTaps& rows, const PhaseTaps& columns, ConvWeight part, int64_t at) {
               const int64_t taps = part.R * part.S;
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
               if (depthwise_fits(part.C, part.K, part.groups))
                 depthwise_pack(part, true, packed + at);
               else
                 direct_pack(part, true, packed + at, num_threads);
             });
}

void phases_grad_x(const ConvBackward& args, const ConvMap<const float>& grad_z, int num_threads) {
  const ConvSizes& s = args.sizes;
  const ConvMap<float>& grad_x = args.grad_x;
  const ConvWeight weight{s.K, s.C, s.R, s.S, s.groups, nullptr, 0, 0, 0};
  const ConvPacking packing{true, false, s.stride_y, s.stride_x, s.dilation_y, s.dilation_x};
  // Pixels that no tap meets.
  if (PhaseTaps::phases(s.R, s.stride_y, s.dilation_y) < s.stride_y ||
      PhaseTaps::phases(s.S, s.stride_x, s.dilation_x) < s.stride_x)
    clear(grad_x, s, num_threads);
  each_phase(
      weight, packing,
      [&](const PhaseTaps& rows, const PhaseTaps& columns, const ConvWeight& part, int64_t at) {
        const PhasePixels down(rows.first * s.dilation_y, s.Y, s.stride_y, s.top);
        const PhasePixels across(columns.first * s.dilation_x, s.X, s.stride_x, s.left);
        if (down.count == 0 || across.count == 0) return;
        ConvForward f{};
        f.y = {grad_x.at(0, 0, down.first, across.first), grad_x.b, grad_x.c, grad_x.y * s.stride_y,
               grad_x.x * s.stride_x};
        f.sizes = {s.B, s.K, s.C, s.conv_y, s.conv_x, part.R, part.S, 1, 1,
                   // No remainder: these taps meet these pixels.
                   (rows.last() * s.dilation_y - down.first - s.top) / s.stride_y,
                   (columns.last() * s.dilation_x - across.first - s.left) / s.stride_x,
                   rows.dilation, columns.dilation, s.groups, down.count, across.count, down.count,
                   across.count, 1, 1, 1, 1, 0, 0, Activation::kNone};
        f.x = grad_z;
        f.packed = args.packed + at;
        conv_forward(f, false, num_threads);
      });
}

}  // namespace mbm::MBM_ISA
