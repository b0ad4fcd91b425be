// Where the parts of the forward's packed weights lie.
#pragma once

#include "common/gemm.h"
#include "gru/gru.h"

namespace mbm::MBM_ISA {

// Panel 3 u + g holds gate g of the units of block u, so one block's r, z and n come out of three
// neighbouring panels and its gates are applied while the tile is in L1.
template <class T>
struct GruPackedParts {
  int64_t C, H, padded;  // padded: H rounded up to kPanel
  T *w_ih, *w_hh;        // [3 blocks, C, kPanel], [3 blocks, H, kPanel]
  T* bias;               // [3 blocks, kPanel]: b_ih, plus b_hh for r and z
  T* bias_hn;            // [padded]: b_hh of n, inside the product with r

  GruPackedParts(T* base, int64_t C, int64_t H)
      : C(C),
        H(H),
        padded(panels_of(H) * kPanel),
        w_ih(base),
        w_hh(base + 3 * padded * C),
        bias(w_hh + 3 * padded * H),
        bias_hn(bias + 3 * padded) {}
  static int64_t size(int64_t C, int64_t H) { return panels_of(H) * kPanel * (3 * (C + H) + 4); }
};

}  // namespace mbm::MBM_ISA
