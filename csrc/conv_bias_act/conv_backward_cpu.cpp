// Backward: grad_z from the saved places, then the gradients that are wanted from it.
#include "conv_bias_act/conv_grad_z.h"
#include "conv_bias_act/conv_plan.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kRows = 8;  // of grad_z in one task

// One side of grad_z with zeros in place of what the stride leaves out between its pixels: `size`
// of those from `first` on.
struct Side {
  int64_t first, size;

  // As it is, at stride 1.
  explicit Side(int64_t outputs) : first(0), size(outputs) {}
  // What a kernel over some pixel of x reaches.
  Side(int64_t pixels, int64_t stride, int64_t before, int64_t reach, int64_t outputs) {
    const int64_t all = (outputs - 1) * stride + 1;
    first = std::clamp<int64_t>(before - reach, 0, all - 1);
    size = std::clamp<int64_t>(pixels + before, first + 1, all) - first;
  }
  bool holds(int64_t i) const { return i >= first && i < first + size; }
};

// The gradient of x is the convolution of grad_z, taken apart by the stride, with the turned
// kernels; grad_z [B, rows.size, columns.size, K] as laid out.
ConvForward transposed(const ConvBackward& args, const ConvMap<const float>& grad_z,
                       const Side& rows, const Side& columns) {
  const ConvSizes& s = args.sizes;
  ConvForward f{};
  f.sizes = {s.B,
             s.K,
             s.C,
             rows.size,
             columns.size,
             s.R,
             s.S,
             1,
             1,
             (s.R - 1) * s.dilation_y - s.top + rows.first,
             (s.S - 1) * s.dilation_x - s.left + columns.first,
             s.dilation_y,
             s.dilation_x,
             s.groups,
             s.Y,
             s.X,
             s.Y,
             s.X,
             1,
             1,
             1,
             1,
             0,
             0,
             Activation::kNone};
  f.x = grad_z;
  f.packed = args.packed;
  f.weight = args.weight;
  f.weight_transposed = true;
  f.y = args.grad_x;
  return f;
}

void copy_residual(const ConvBackward& args, const float* grad_z, int64_t padded, int threads) {
  const ConvSizes& s = args.sizes;
  const ConvMap<float>& to = args.grad_residual;
  parallel_for(threads, s.B * s.conv_y, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = grad_z + i * s.conv_x * padded;
      const int64_t b = i / s.conv_y, y = i % s.conv_y;
      if (to.c == 1) {
        for (int64_t x = 0; x < s.conv_x; ++x)
          std::copy_n(from + x * padded, s.K, to.at(b, 0, y, x));
      } else {
        transpose_rows({from, padded, nullptr}, 0, static_cast<int>(s.conv_x), 0, s.K,
                       to.at(b, 0, y, 0), to.c);
      }
    }
  });
}

// grad_y is grad_z, and laid out as such.
bool is_grad_z(const ConvBackward& args) {
  const ConvSizes& s = args.sizes;
  const ConvMap<const float>& g = args.grad_y;
  return !args.places && !args.z && s.K % kLanes == 0 && (s.groups == 1 || s.groups == s.K) &&
         g.c == 1 && g.x == s.K && g.y == s.K * s.conv_x && g.b == s.K * s.conv_x * s.conv_y;
}

// bias [K] += the rows of grad_z, `count` pixels.
void add_pixels(const float* grad_z, int64_t count, int64_t K, float* bias) {
  for (int64_t i = 0; i < count; ++i, grad_z += K)
    for (int64_t k = 0; k < K; k += kLanes) store(bias + k, load(bias + k) + load(grad_z + k));
}

void sum_bias(const ConvBackward& args, const float* parts, int64_t count, int64_t padded) {
  for (int64_t k = 0; k < args.sizes.K; ++k) {
    float total = 0.0f;
    for (int64_t i = 0; i < count; ++i) total += parts[i * padded + k];
    args.grad_bias[k] = total;
  }
}

}  // namespace

void conv_backward(const ConvBackward& args, bool winograd_x, bool winograd_weight,
                   int num_threads) {
  const ConvSizes& s = args.sizes;
  const GradZ grad(args);
  const int64_t padded = grad.padded();
  const bool depthwise = depthwise_fits(s.C, s.K, s.groups);
  const bool few = args.grad_x.data && few_channels_fit(s);
  const bool whole = (args.grad_x.data && !few) || args.grad_residual.data ||
                     (args.grad_weight && (winograd_weight || depthwise));
  if (few) few_channels_grad_x(args, num_threads);
  if (!whole) {
    if (args.grad_weight || args.grad_bias) direct_grad_weight(args, nullptr, num_threads);
    return;
  }
  const ConvPacking packing{true, false, s.stride_y, s.stride_x, s.dilation_y, s.dilation_x};
  const bool phases = phases_fit(s.C, s.K, s.groups, packing);
  // Strided products of grad_z with the kernel are plain ones with zeros between its pixels.
  const bool apart = args.grad_x.data && !few && !phases && s.stride_y * s.stride_x > 1;
  const int64_t chunks = (s.conv_y + kRows - 1) / kRows;
  const int64_t slack = 2 * kLanes;  // a vector of the last group may end past its channels
  const bool given = is_grad_z(args);
  const int64_t floats = given ? 0 : s.B * s.conv_y * s.conv_x * padded + slack;
  const Side rows =
      apart ? Side(s.Y, s.stride_y, s.top, (s.R - 1) * s.dilation_y, s.conv_y) : Side(s.conv_y);
  const Side columns =
      apart ? Side(s.X, s.stride_x, s.left, (s.S - 1) * s.dilation_x, s.conv_x) : Side(s.conv_x);
  const Scratch memory(sizeof(float) * (floats + s.B * chunks * padded +
                                        (apart ? s.B * rows.size * columns.size * padded : 0)));
  float* spread = memory.as<float>();
  const float* grad_z = given ? args.grad_y.data : spread;
  float* bias = spread + floats;
  float* spaced = bias + s.B * chunks * padded;
  const bool idle = given && !args.grad_bias && !apart;
  parallel_for(num_threads, idle ? 0 : s.B * chunks, 1, [&](int64_t begin, int64_t end) {
    const Scratch stage(sizeof(float) * grad.staged());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / chunks, r0 = i % chunks * kRows, r1 = std::min(s.conv_y, r0 + kRows);
      float* sums = args.grad_bias ? bias + i * padded : nullptr;
      if (sums) std::fill_n(sums, padded, 0.0f);
      const int64_t image = b * s.conv_y * s.conv_x * padded;
      const float* from = grad_z + image;
      if (!given)
        grad.rows(b, r0, r1, {spread + image, s.conv_x * padded, padded, 0}, sums,
                  stage.as<float>());
      else if (sums)
        add_pixels(from + r0 * s.conv_x * padded, (r1 - r0) * s.conv_x, padded, sums);
      if (apart) {
        const int64_t row = columns.size * padded;
        float* to = spaced + b * rows.size * row;
        const auto place = [&](int64_t y) {  // of row y among those that are kept
          return std::clamp<int64_t>(y * s.stride_y - rows.first, 0, rows.size);
        };
        const int64_t end = r1 == s.conv_y ? rows.size : place(r1);
        std::fill_n(to + place(r0) * row, (end - place(r0)) * row, 0.0f);
        for (int64_t y = r0; y < r1; ++y)
          for (int64_t x = 0; rows.holds(y * s.stride_y) && x < s.conv_x; ++x)
            if (columns.holds(x * s.stride_x))
              std::copy_n(from + (y * s.conv_x + x) * padded, padded,
                          to + place(y) * row + (x * s.stride_x - columns.first) * padded);
      }
    }
  });
  if (args.grad_bias) sum_bias(args, bias, s.B * chunks, padded);
  if (args.grad_residual.data) copy_residual(args, grad_z, padded, num_threads);
  if (args.grad_x.data && phases) {
    const int64_t row = s.conv_x * padded;
    phases_grad_x(args, {grad_z, s.conv_y * row, 1, row, padded}, num_threads);
  } else if (args.grad_x.data && !few) {
    const int64_t row = columns.size * padded;
    const ConvMap<const float> map{apart ? spaced : grad_z, rows.size * row, 1, row, padded};
    const ConvForward f = transposed(args, map, rows, columns);
    conv_forward(f, winograd_x, num_threads);
  }
  if (args.grad_weight) {
    ConvBackward rest = args;
    rest.grad_bias = nullptr;
    if (depthwise)
      depthwise_grad_weight(rest, grad_z, num_threads);
    else if (winograd_weight)
      winograd_grad_weight(rest, grad_z, num_threads);
    else
      direct_grad_weight(rest, grad_z, num_threads);
  }
}

}  // namespace mbm::MBM_ISA
