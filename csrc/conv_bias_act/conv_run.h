// The epilogue of sums that lie where y does, bias added: neighbours in memory, channels or pixels.
#pragma once

#include "conv_bias_act/conv_epilogue.h"

namespace mbm::MBM_ISA {

struct Run {
  float* y;               // sums, replaced by the results
  const float* residual;  // or null
  uint8_t* places;        // written, or null
  float* z;               // written, or null
  int64_t n;              // neighbours
  // Further runs: how many in all, and what lies between them in each of these; places as z.
  int64_t runs = 1, y_step = 0, residual_step = 0, z_step = 0;
};

// fixed: the activation.
template <int fixed>
void finish_run(const Run& all) {
  constexpr Activation activation = static_cast<Activation>(fixed);
  Run run = all;
  const auto part = [&run](int64_t i, int n) {
    vf z = load_channels(run.y + i, n);
    if (run.residual) z = z + load_channels(run.residual + i, n);
    const vf a = activate(activation, z);
    store_channels(run.y + i, a, n);
    if (run.places) store_bytes(run.places + i, mark_low(activation, a, vi{}), n);
    if (run.z) store_channels(run.z + i, z, n);
  };
  const int64_t whole = run.n / kLanes * kLanes;
  for (; run.runs > 0; --run.runs) {
    for (int64_t i = 0; i < whole; i += kLanes) part(i, kLanes);
    if (whole < run.n) part(whole, static_cast<int>(run.n - whole));
    run.y += run.y_step;
    if (run.residual) run.residual += run.residual_step;
    if (run.places) run.places += run.z_step;
    if (run.z) run.z += run.z_step;
  }
}

// Channels [k, k + n) of pixels [x, end) of row y, of which y holds the sums; no pool, channels
// side by side.
inline Run channels_run(const ConvForward& args, int64_t b, int64_t k, int64_t n, int64_t y,
                        int64_t x, int64_t end) {
  const ConvSizes& s = args.sizes;
  const ConvMap<const float>& residual = args.residual;
  const int64_t saved = ((b * s.conv_y + y) * s.conv_x + x) * s.K + k;
  Run run{args.y.at(b, k, y, x),
          residual.data ? residual.at(b, k, y, x) : nullptr,
          args.places ? args.places + saved : nullptr,
          args.z ? args.z + saved : nullptr,
          n,
          end - x,
          args.y.x,
          residual.x,
          s.K};
  if (n == s.K && args.y.x == n && (!residual.data || residual.x == n)) {
    run.n *= run.runs;
    run.runs = 1;
  }
  return run;
}

using FinishRunFn = void (*)(const Run&);

inline FinishRunFn finish_run_for(Activation activation) {
  static constexpr FinishRunFn table[] = {
      finish_run<0>, finish_run<1>, finish_run<2>, finish_run<3>, finish_run<4>,
      finish_run<5>, finish_run<6>, finish_run<7>, finish_run<8>, finish_run<9>};
  return table[static_cast<int>(activation)];
}

// What a tile takes itself, in registers.
inline bool plain(Activation a) { return a == Activation::kNone || a == Activation::kRelu; }

// What must run over the sums of a tile that adds the bias and takes the relu itself; null:
// nothing.
inline FinishRunFn finish_after_tile(const ConvForward& args) {
  const Activation a = args.sizes.activation;
  return plain(a) && !args.residual.data && !args.places ? nullptr : finish_run_for(a);
}

}  // namespace mbm::MBM_ISA
