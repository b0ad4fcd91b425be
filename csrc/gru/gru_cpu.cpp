// Packed forms of the weights (gru.h).
#include "gru/gru_pack.h"

namespace mbm::MBM_ISA {

GruPackedSizes gru_packed_sizes(int64_t C, int64_t H) {
  return {GruPackedParts<float>::size(C, H), panels_of(H) * 3 * H * kPanel,
          panels_of(C) * 3 * H * kPanel};
}

void gru_pack_forward(int64_t C, int64_t H, const float* w_ih, const float* w_hh, const float* b_ih,
                      const float* b_hh, float* out, int num_threads) {
  const GruPackedParts<float> packed(out, C, H);
  const int threads = H * (C + H) < 32768 ? 1 : num_threads;
  parallel_for(threads, panels_of(H) * 3, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t unit = p / 3 * kPanel, gate = p % 3, column = gate * H + unit;
      const int count = static_cast<int>(H - unit < kPanel ? H - unit : kPanel);
      pack_panel(Rows{w_ih, C}, true, column, count, C, packed.w_ih + p * C * kPanel);
      pack_panel(Rows{w_hh, H}, true, column, count, H, packed.w_hh + p * H * kPanel);
      float* bias = packed.bias + p * kPanel;
      float* bias_hn = packed.bias_hn + unit;
      for (int j = 0; j < kPanel; ++j) {
        const float bi = b_ih && j < count ? b_ih[column + j] : 0.0f;
        const float bh = b_hh && j < count ? b_hh[column + j] : 0.0f;
        bias[j] = gate < 2 ? bi + bh : bi;
        if (gate == 2) bias_hn[j] = bh;
      }
    }
  });
}

void gru_pack_recurrent(int64_t H, const float* w_hh, float* out, int num_threads) {
  pack_b(num_threads, Rows{w_hh, H}, false, H, 3 * H, out);
}

void gru_pack_input(int64_t C, int64_t H, const float* w_ih, float* out, int num_threads) {
  // Gates in the order n, r, z of the saved gate gradients.
  const Scratch rows(sizeof(const float*) * static_cast<size_t>(3 * H));
  const float** at = rows.as<const float*>();
  for (int64_t k = 0; k < 3 * H; ++k) at[k] = w_ih + (k < H ? 2 * H + k : k - H) * C;
  pack_b(num_threads, Rows{nullptr, 0, at}, false, C, 3 * H, out);
}

}  // namespace mbm::MBM_ISA
