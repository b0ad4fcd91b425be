// Direct convolution: strips of input rows in cache, register tiles of pixels by output channels,
// and the epilogue on what a few output rows need.
#include "conv_bias_act/conv_epilogue.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_strip.h"
#include "conv_bias_act/conv_tile.h"

namespace mbm::MBM_ISA {

// [group][panel][R][S][channel][kPanel], as StripPlan's segments.
int64_t direct_packed_size(const ConvWeight& w, bool transposed) {
  const int64_t outputs = (transposed ? w.C : w.K) / w.groups;
  const int64_t inputs = (transposed ? w.K : w.C) / w.groups;
  return w.groups * panels_of(outputs) * inputs * w.R * w.S * kPanel;
}

void direct_pack(const ConvWeight& weight, bool transposed, float* packed, int num_threads) {
  const int64_t K = (transposed ? weight.C : weight.K) / weight.groups;
  const int64_t C = (transposed ? weight.K : weight.C) / weight.groups;
  const int64_t taps = weight.R * weight.S, panels = panels_of(K);
  const int threads = weight.K * C * taps < 32768 ? 1 : num_threads;
  parallel_for(threads, weight.groups * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / panels, k0 = i % panels * kPanel;
      float* to = packed + i * C * taps * kPanel;
      const float* w = weight.data + g * (transposed ? C : K) * weight.k_step;
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < C; ++c)
          for (int64_t k = k0; k < k0 + kPanel; ++k, ++to) {
            if (k >= K)
              *to = 0.0f;
            else if (transposed)  // [g][c][k]: K and C of the product
              *to = w[c * weight.k_step + k * weight.c_step + (taps - 1 - tap) * weight.tap_step];
            else
              *to = w[k * weight.k_step + c * weight.c_step + tap * weight.tap_step];
          }
    }
  });
}

namespace {

constexpr int64_t kStripBytes = 256 << 10;
constexpr int64_t kTilesAtOnce = kLanes == 16 ? 4 : 8;  // their sums take 14 KiB of L1 at most
constexpr int64_t kWeightBytes = 64 << 10;
constexpr int64_t kTasks = 32;  // wanted, so that threads end together

class Direct {
 public:
  Direct(const ConvForward& args, int64_t out_rows)
      : args_(args),
        s_(args.sizes),
        plan_(s_, (out_rows - 1) * s_.pool_stride_y + s_.pool_y),
        outputs_(s_.K / s_.groups),
        panels_(panels_of(outputs_)) {
    int64_t weights = 0;
    for (size_t first = 0, end = 0; end < plan_.segments.size(); first = end) {
      int64_t depth = 0;
      while (end < plan_.segments.size() && depth < kSliceDepth)
        depth += plan_.segments[end++].depth;
      slices_.push_back({&plan_.segments[first], static_cast<int64_t>(end - first), weights});
      weights += depth * kPanel;
    }
    sum_row_ = (side_by_side() ? kTilesAtOnce : plan_.tiles_across) * kMaxRows * kPanel;
  }

  // Rows [p0, p1) of the output of image b, channels of group g.
  void rows(int64_t b, int64_t g, int64_t p0, int64_t p1) const {
    const int64_t y0 = std::max<int64_t>(0, p0 * s_.pool_stride_y - s_.pool_top);
    const int64_t y1 = std::min(s_.conv_y, (p1 - 1) * s_.pool_stride_y - s_.pool_top + s_.pool_y);
    const int64_t height = (p1 - p0 - 1) * s_.pool_stride_y + s_.pool_y;
    const int64_t kept = side_by_side() ? s_.pool_y : height;
    const Scratch memory(sizeof(float) *
                         (plan_.floats() + kept * sum_row_ + staged_floats(s_, kept, s_.conv_x)));
    float* strip = memory.as<float>();
    float* sums = strip + plan_.floats();
    float* staged = sums + kept * sum_row_;
    pack_strip(s_, args_.x, plan_, b, g, y0, strip);
    const int64_t weights = plan_.channels * s_.R * s_.S * kPanel;  // of a panel
    // Panels take turns row by row where all of them stay in cache, so that the channels of a pixel
    // are written close to one another.
    const bool by_row = side_by_side() && panels_ * weights * 4 <= kWeightBytes;
    for (int64_t first = p0; first < p1; first = by_row ? first + 1 : p1)
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const Panel now{b, g, panel, args_.packed + (g * panels_ + panel) * weights};
        if (!side_by_side()) {
          for (int64_t t = 0; t < plan_.tiles_across; ++t)
            multiply(now, strip, y0, y0, y1, t, sums + t * kMaxRows * kPanel);
          finish_panel(now, sums, y0, y1, 0, s_.conv_x, p0, p1, 0, s_.out_x, staged);
          continue;
        }
        // A few register tiles are finished while they are in L1; kMaxRows is even.
        for (int64_t p = first; p < (by_row ? first + 1 : p1); ++p)
          for (int64_t t0 = 0; t0 < plan_.tiles_across; t0 += kTilesAtOnce) {
            const int64_t t1 = std::min(t0 + kTilesAtOnce, plan_.tiles_across);
            const int64_t y = p * s_.pool_y, x = t0 * kMaxRows;
            const int64_t end = std::min(s_.conv_x, t1 * kMaxRows);
            for (int64_t t = t0; t < t1; ++t)
              multiply(now, strip, y0, y, y + s_.pool_y, t, sums + (t - t0) * kMaxRows * kPanel);
            finish_panel(now, sums, y, y + s_.pool_y, x, end, p, p + 1, x / s_.pool_x,
                         std::min(s_.out_x, end / s_.pool_x), staged);
          }
      }
  }

 private:
  // Rows of the output use rows of the convolution apart from one another.
  bool side_by_side() const { return pool_kind(s_) != 1; }

  // Segments whose products are one sum, and where their weights begin in a panel.
  struct Slice {
    const Segment* segments;
    int64_t count, weights;
  };

  struct Panel {
    int64_t b, g, index;
    const float* weights;
  };

  // Tile t of rows [y, y1) of the convolution into sums; the strip begins at row y0.
  void multiply(const Panel& panel, const float* strip, int64_t y0, int64_t y, int64_t y1,
                int64_t t, float* sums) const {
    const int vectors = vectors_of(outputs_ - panel.index * kPanel);
    const bool half = s_.conv_x - t * kMaxRows <= kMaxRows / 2;
    const ConvMicroFn micro = pixels_micro(half, vectors, plan_.step);
    for (; y < y1; ++y, sums += sum_row_) {
      const float* pixels = strip + (y - y0) * plan_.down + t * kMaxRows * plan_.step;
      for (const Slice& slice : slices_)
        micro(slice.segments, slice.count, pixels, plan_.step, panel.weights + slice.weights, sums,
              slice.weights > 0);
    }
  }

  // Outputs [p0, p1) x [q0, q1) from the sums of pixels [y0, y1) x [x0, x1).
  void finish_panel(const Panel& panel, const float* sums, int64_t y0, int64_t y1, int64_t x0,
                    int64_t x1, int64_t p0, int64_t p1, int64_t q0, int64_t q1,
                    float* staged) const {
    for (int half = 0; half < vectors_of(outputs_ - panel.index * kPanel); ++half) {
      const int64_t k = panel.index * kPanel + half * kLanes;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, outputs_ - k));
      finish(args_, panel.b, panel.g * outputs_ + k, n,
             {sums + half * kLanes, sum_row_, kPanel, y0, x0}, y1, x1, p0, p1, q0, q1, staged);
    }
  }

  const ConvForward& args_;
  const ConvSizes& s_;
  StripPlan plan_;
  std::vector<Slice> slices_;
  int64_t outputs_, panels_, sum_row_;
};

// Output rows of a task: as many as fit, so that the rows between two strips are a small part.
int64_t rows_of_task(const ConvSizes& s) {
  const StripPlan one(s, s.pool_y);
  const int64_t floats_per_row = one.down * one.blocks * s.pool_stride_y;
  const int64_t most = std::max<int64_t>(1, kStripBytes / 4 / floats_per_row);
  const int64_t wanted = std::max<int64_t>(1, s.B * s.groups * s.out_y / kTasks);
  return std::clamp<int64_t>(std::min(most, wanted), std::min<int64_t>(2, s.out_y), s.out_y);
}

}  // namespace

void direct_forward(const ConvForward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  if (s.B == 0 || s.out_y == 0 || s.out_x == 0) return;
  if (group_strips_fit(args)) return group_strips_forward(args, num_threads);
  if (group_rows_fit(args)) return group_rows_forward(args, num_threads);
  const int64_t size = rows_of_task(s), cuts = (s.out_y + size - 1) / size;
  const Direct direct(args, size);
  const int64_t work = s.B * s.K * s.conv_y * s.conv_x * (s.C / s.groups) * s.R * s.S;
  // Below half a million multiply-adds a second thread costs more than it brings.
  const int threads = work < 500000 ? 1 : num_threads;
  parallel_for(threads, s.B * s.groups * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % cuts * size, g = i / cuts % s.groups, b = i / cuts / s.groups;
      direct.rows(b, g, p, std::min(s.out_y, p + size));
    }
  });
}

int64_t conv_packed_size(const ConvWeight& w, const ConvPacking& packing) {
  if (depthwise_fits(w.C, w.K, w.groups)) return depthwise_packed_size(w);
  if (!packing.winograd) return direct_packed_size(w, packing.transposed);
  return packing.transposed ? winograd_packed_size(w.K, w.C) : winograd_packed_size(w.C, w.K);
}

void conv_pack(const ConvWeight& weight, const ConvPacking& packing, float* packed,
               int num_threads) {
  if (packing.transposed && phases_fit(weight.C, weight.K, weight.groups, packing))
    phases_pack(weight, packing, packed, num_threads);
  else if (depthwise_fits(weight.C, weight.K, weight.groups))
    depthwise_pack(weight, packing.transposed, packed);
  else if (packing.winograd)
    winograd_pack(weight, packing.transposed, packed, num_threads);
  else
    direct_pack(weight, packing.transposed, packed, num_threads);
}

ConvKernel conv_kernel(const ConvForward& args, bool winograd) {
  if (depthwise_fits(args.sizes.C, args.sizes.K, args.sizes.groups)) return ConvKernel::kDepthwise;
  if (few_forward_fits(args)) return ConvKernel::kFew;
  if (winograd) return ConvKernel::kWinograd;
  if (pixels_fit(args)) return ConvKernel::kPixels;
  return planes_fit(args) ? ConvKernel::kPlanes : ConvKernel::kDirect;
}

void conv_forward(const ConvForward& args, bool winograd, int num_threads) {
  switch (conv_kernel(args, winograd)) {
    case ConvKernel::kDepthwise: return depthwise_forward(args, num_threads);
    case ConvKernel::kFew: return few_forward(args, num_threads);
    case ConvKernel::kWinograd: return winograd_forward(args, num_threads);
    case ConvKernel::kPixels: return pixels_forward(args, num_threads);
    case ConvKernel::kPlanes: return planes_forward(args, num_threads);
    case ConvKernel::kDirect: return direct_forward(args, num_threads);
  }
}

}  // namespace mbm::MBM_ISA
