// Convolution of an input of 1 to 4 channels: a register tile is two rows of neighbouring pixels,
// which get their bias, relu and 2x2 pool before they leave the registers. Other activations follow
// two rows at a time, while these are in L1.
#include "conv_bias_act/conv_epilogue.h"
#include "conv_bias_act/conv_plan.h"
#include "conv_bias_act/conv_run.h"
#include "conv_bias_act/conv_strip.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kStripBytes = 128 << 10;
constexpr int64_t kTasks = 32;                   // wanted, so that threads end together
constexpr int kMaxPairs = kLanes == 16 ? 6 : 3;  // of columns: 24 of 32, or 12 of 16, registers

struct FewTile {
  const Segment* segments;
  int64_t count;
  const float* pixels;  // of the strip
  int64_t step, down;   // floats between pixels, and between their two rows
  const float* weights;
  const float* bias;  // kPanel floats
  float* y;
  int64_t y_column, y_row;
  uint8_t* places;  // or null
  int64_t place_column, place_row;
  int n;              // channels of the last vector
  int columns, rows;  // of the map that lie in the tile; without a pool
  bool relu;
  float* sums;  // [2][2 kMaxPairs][kPanel], written where the tile is left to finish()
};

// Sums of 2 x 2 NP pixels and NV vectors of channels, begun with the bias. False where a pool meets
// what may be a NaN: then the sums are stored.
template <int NP, int NV, int STEP, bool POOL>
bool few_micro(const FewTile& t) {
  constexpr int PX = 2 * NP;
  vf acc[2][PX][NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    const vf bias = load(t.bias + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < 2 * PX; ++i) acc[i / PX][i % PX][v] = bias;
  }
  const int64_t step = STEP > 0 ? STEP : t.step;
  const float* w = t.weights;
  for (int64_t s = 0; s < t.count; ++s) {
    const float* a0 = t.pixels + t.segments[s].offset;
    const float* a1 = a0 + t.down;
    const float* end = w + t.segments[s].depth * kPanel;
    for (; w < end; w += kPanel, ++a0, ++a1) {
      // Neighbouring pixels overlap; kept in registers over the turns they would spill the sums.
      asm("" : "+r"(a0), "+r"(a1));
      vf weights[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) weights[v] = load(w + v * kLanes);
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const float* a = r ? a1 : a0;
#pragma GCC unroll 16
        for (int i = 0; i < PX; ++i) {
          const vf pixel = set1(a[i * step]);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) acc[r][i][v] = fma(pixel, weights[v], acc[r][i][v]);
        }
      }
    }
  }
  if constexpr (!POOL) {
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      if (r == t.rows) break;
#pragma GCC unroll 16
      for (int i = 0; i < PX; ++i) {
        if (i >= t.columns) break;
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          const int n = v == NV - 1 ? t.n : kLanes;
          const vf y = t.relu ? max(zero(), acc[r][i][v]) : acc[r][i][v];
          store_channels(t.y + r * t.y_row + i * t.y_column + v * kLanes, y, n);
          if (t.places)
            store_bytes(t.places + r * t.place_row + i * t.place_column + v * kLanes,
                        mark_low(Activation::kRelu, y, vi{}), n);
        }
      }
    }
    return true;
  }
  vf total = zero();
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v)
#pragma GCC unroll 16
    for (int i = 0; i < PX; ++i) total = total + (acc[0][i][v] + acc[1][i][v]);
  if (any_nan(total)) {
#pragma GCC unroll 16
    for (int i = 0; i < 2 * PX; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        store(t.sums + ((i / PX) * 2 * kMaxPairs + i % PX) * kPanel + v * kLanes,
              acc[i / PX][i % PX][v]);
    return false;
  }
#pragma GCC unroll 8
  for (int i = 0; i < NP; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const vf z0 = acc[0][2 * i][v], z1 = acc[0][2 * i + 1][v];
      const vf z2 = acc[1][2 * i][v], z3 = acc[1][2 * i + 1][v];
      const vf top = max(z1, z0), low = max(z3, z2);
      const int n = v == NV - 1 ? t.n : kLanes;
      // relu commutes with the maximum: what it makes equal has gradient 0.
      vf y = max(low, top);
      if (t.relu) y = max(zero(), y);
      store_channels(t.y + i * t.y_column + v * kLanes, y, n);
      if (t.places) {
        const vi lower = z3 > z2 ? vi{} + 3 : vi{} + 2;
        const vi upper = z1 > z0 ? vi{} + 1 : vi{};
        const vi place = low > top ? lower : upper;
        store_bytes(t.places + i * t.place_column + v * kLanes,
                    t.relu ? mark_low(Activation::kRelu, y, place) : place, n);
      }
    }
  return true;
}

using FewMicroFn = bool (*)(const FewTile&);

template <int NP, int STEP, bool POOL>
constexpr FewMicroFn few_micro_or_null(int vectors) {
  if (vectors == 1) return few_micro<NP, 1, STEP, POOL>;
  if constexpr (2 * NP <= kMaxPairs) return few_micro<NP, 2, STEP, POOL>;
  return nullptr;
}

template <int STEP, bool POOL>
FewMicroFn few_micro_of_pairs(int pairs, int vectors) {
  switch (pairs) {
    case 1: return few_micro_or_null<1, STEP, POOL>(vectors);
    case 2: return few_micro_or_null<2, STEP, POOL>(vectors);
    case 3: return few_micro_or_null<3, STEP, POOL>(vectors);
    default:
      if constexpr (kMaxPairs > 3) return few_micro_or_null<6, STEP, POOL>(vectors);
  }
  return nullptr;
}

FewMicroFn few_micro_for(int pairs, int vectors, int64_t step, bool pool) {
  if (step == 3)
    return pool ? few_micro_of_pairs<3, true>(pairs, vectors)
                : few_micro_of_pairs<3, false>(pairs, vectors);
  return pool ? few_micro_of_pairs<0, true>(pairs, vectors)
              : few_micro_of_pairs<0, false>(pairs, vectors);
}

// Of the largest tile, or the whole of what is left in fewer steps.
int pairs_at_once(int vectors, int64_t left) {
  const int most = kMaxPairs / vectors;
  if (left >= most) return most;
  return static_cast<int>(std::min<int64_t>(left, 3));
}

// A line is two rows of the convolution.
class Few {
 public:
  Few(const ConvForward& args, int64_t lines)
      : args_(args),
        s_(args.sizes),
        pool_(pool_kind(s_) == 2),
        plan_(s_, 2 * lines),
        panels_(panels_of(s_.K)),
        bias_(panels_ * kPanel, 0.0f),
        biased_(args) {
    if (args.bias) std::copy_n(args.bias, s_.K, bias_.begin());
    biased_.bias = nullptr;
    if (!plain(s_.activation)) finish_ = finish_run_for(s_.activation);
    pairs_ = pool_ ? s_.out_x : (s_.conv_x + 1) / 2;
  }

  void lines(int64_t b, int64_t first, int64_t last) const {
    const int64_t width = 2 * pairs_, staged_rows = pool_ ? 1 : 2;
    const bool nhwc = args_.y.c == 1;
    const int64_t stage = nhwc ? 0 : staged_rows * width * kPanel;
    const Scratch memory(sizeof(float) * (plan_.floats() + stage + 4 * kMaxPairs * kPanel +
                                          staged_floats(s_, 2, 2 * kMaxPairs)));
    float* strip = memory.as<float>();
    float* staged = strip + plan_.floats();
    float* sums = staged + stage;
    pack_strip(s_, args_.x, plan_, b, 0, 2 * first, strip);
    for (int64_t line = first; line < last; ++line) {
      const float* pixels = strip + 2 * (line - first) * plan_.down;
      if (nhwc) {  // all channels of a few pixels, so that they are written side by side
        for (int64_t pair = 0; pair < pairs_;) {
          const int now = pairs_at_once(most_vectors(), pairs_ - pair);
          for (int64_t panel = 0; panel < panels_; ++panel)
            tile(b, line, panel, pair, now, pixels, nullptr, sums);
          pair += now;
        }
        for (int64_t y = 2 * line; finish_ && y < std::min(s_.conv_y, 2 * line + 2); ++y)
          finish_(channels_run(args_, b, 0, s_.K, y, 0, s_.conv_x));
        continue;
      }
      for (int64_t panel = 0; panel < panels_; ++panel) {
        for (int64_t pair = 0; pair < pairs_;) {
          const int now = pairs_at_once(vectors_of(s_.K - panel * kPanel), pairs_ - pair);
          tile(b, line, panel, pair, now, pixels, staged, sums);
          pair += now;
        }
        spread(b, line, panel, staged);
      }
    }
  }

  int64_t lines() const { return pool_ ? s_.out_y : (s_.conv_y + 1) / 2; }

 private:
  int most_vectors() const { return vectors_of(s_.K); }

  // staged: where the pixels of a row go side by side, or null for their places in y.
  void tile(int64_t b, int64_t line, int64_t panel, int64_t pair, int pairs, const float* pixels,
            float* staged, float* sums) const {
    const int64_t k = panel * kPanel, left = s_.K - k, shrink = pool_ ? 1 : 2;
    const int vectors = vectors_of(left);
    const int64_t y = shrink * line, x = shrink * pair;
    FewTile t;
    t.segments = plan_.segments.data();
    t.count = static_cast<int64_t>(plan_.segments.size());
    t.pixels = pixels + 2 * pair * plan_.step;
    t.step = plan_.step;
    t.down = plan_.down;
    t.weights = args_.packed + panel * plan_.channels * s_.R * s_.S * kPanel;
    t.bias = bias_.data() + k;
    t.n = static_cast<int>(std::min<int64_t>(kLanes, left - (vectors - 1) * kLanes));
    t.y = staged ? staged + x * kPanel : args_.y.at(b, k, y, x);
    t.y_column = staged ? kPanel : args_.y.x;
    t.y_row = staged ? 2 * pairs_ * kPanel : args_.y.y;
    const int64_t at = ((b * s_.out_y + y) * s_.out_x + x) * s_.K + k;
    t.places = args_.places && !finish_ ? args_.places + at : nullptr;
    t.place_column = s_.K;
    t.place_row = s_.out_x * s_.K;
    t.columns = static_cast<int>(std::min<int64_t>(2 * pairs, s_.conv_x - x));
    t.rows = static_cast<int>(std::min<int64_t>(2, s_.conv_y - y));
    t.relu = s_.activation == Activation::kRelu;
    t.sums = sums;
    if (few_micro_for(pairs, vectors, plan_.step, pool_)(t)) return;
    for (int half = 0; half < vectors; ++half)
      finish(biased_, b, k + half * kLanes, half == vectors - 1 ? t.n : kLanes,
             {sums + half * kLanes, 2 * kMaxPairs * kPanel, kPanel, 2 * y, 2 * x}, 2 * y + 2,
             2 * (x + pairs), y, y + 1, x, x + pairs, sums + 4 * kMaxPairs * kPanel);
    if (staged)  // spread() copies it again
      for (int i = 0; i < pairs; ++i)
        for (int64_t c = 0; c < std::min<int64_t>(kPanel, left); ++c)
          t.y[i * kPanel + c] = *args_.y.at(b, k + c, y, x + i);
  }

  // The staged pixels of a line, finished, into rows of channels.
  void spread(int64_t b, int64_t line, int64_t panel, float* staged) const {
    const int64_t k = panel * kPanel, y = pool_ ? line : 2 * line;
    const int n = static_cast<int>(std::min<int64_t>(kPanel, s_.K - k));
    for (int64_t r = 0; r < (pool_ ? 1 : std::min<int64_t>(2, s_.conv_y - y)); ++r) {
      float* row = staged + r * 2 * pairs_ * kPanel;
      if (finish_) {
        Run run = channels_run(args_, b, k, n, y + r, 0, s_.conv_x);
        run.y = row;
        run.n = n;
        run.runs = s_.conv_x;
        run.y_step = kPanel;
        finish_(run);
      }
      float* to = args_.y.at(b, k, y + r, 0);
      int64_t x = 0;
      // Planes a power of two apart share sets of L1: a vector of each channel at a time.
      alignas(64) float block[kPanel * kLanes];
      for (; args_.y.c % 512 == 0 && x + kLanes <= s_.out_x; x += kLanes) {
        transpose_rows({row + x * kPanel, kPanel, nullptr}, 0, kLanes, 0, n, block, kLanes);
        for (int c = 0; c < n; ++c) store(to + c * args_.y.c + x, load(block + c * kLanes));
      }
      transpose_rows({row + x * kPanel, kPanel, nullptr}, 0, static_cast<int>(s_.out_x - x), 0, n,
                     to + x, args_.y.c);
    }
  }

  const ConvForward& args_;
  const ConvSizes& s_;
  bool pool_;
  StripPlan plan_;
  int64_t panels_, pairs_;
  std::vector<float> bias_;
  ConvForward biased_;  // its sums have the bias in them
  FinishRunFn finish_ = nullptr;
};

}  // namespace

bool few_forward_fits(const ConvForward& args) {
  const ConvSizes& s = args.sizes;
  return s.groups == 1 && s.C <= kFewChannels && pool_kind(s) != 1 && !args.residual.data &&
         (args.y.c == 1 || args.y.x == 1) && (pool_kind(s) == 0 || plain(s.activation));
}

void few_forward(const ConvForward& args, int num_threads) {
  const ConvSizes& s = args.sizes;
  if (s.B == 0 || s.out_y == 0 || s.out_x == 0) return;
  const int64_t lines = Few(args, 1).lines(), row = StripPlan(s, 1).down * 2 * 4;
  const int64_t size =
      std::clamp<int64_t>(std::min(kStripBytes / row, s.B * lines / kTasks), 1, lines);
  const int64_t cuts = (lines + size - 1) / size;
  const Few few(args, size);
  const int64_t work = s.B * s.K * s.conv_y * s.conv_x * s.C * s.R * s.S;
  // Below half a million multiply-adds a second thread costs more than it brings.
  parallel_for(work < 500000 ? 1 : num_threads, s.B * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % cuts * size;
      few.lines(i / cuts, first, std::min(lines, first + size));
    }
  });
}

}  // namespace mbm::MBM_ISA
