// The epilogue of sums that lie where y does, bias added: neighbours in memory, channels or pixels.
#pragma once

#include "conv_bias_act/conv_epilogue.h"

namespace mbm::MBM_ISA {

struct Run {
  float* y;               // n sums, replaced by the results
  const float* residual;  // n, or null
  uint8_t* places;        // n, written, or null
  float* z;               // n, written, or null
  int64_t n;
};

// fixed: the activation.
template <int fixed>
void finish_run(const Run& run) {
  constexpr Activation activation = static_cast<Activation>(fixed);
  const auto part = [&run](int64_t i, int n) {
    vf z = load_channels(run.y + i, n);
    if (run.residual) z = z + load_channels(run.residual + i, n);
    const vf a = activate(activation, z);
    store_channels(run.y + i, a, n);
    if (run.places) store_bytes(run.places + i, mark_low(activation, a, vi{}), n);
    if (run.z) store_channels(run.z + i, z, n);
  };
  const int64_t whole = run.n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) part(i, kLanes);
  if (whole < run.n) part(whole, static_cast<int>(run.n - whole));
}

using FinishRunFn = void (*)(const Run&);

inline FinishRunFn finish_run_for(Activation activation) {
  static constexpr FinishRunFn table[] = {
      finish_run<0>, finish_run<1>, finish_run<2>, finish_run<3>, finish_run<4>,
      finish_run<5>, finish_run<6>, finish_run<7>, finish_run<8>, finish_run<9>};
  return table[static_cast<int>(activation)];
}

}  // namespace mbm::MBM_ISA
