// One step of a GRU, forward and backward, float32, from the weights as they are: a step reads them
// once, so that packing would cost more than it brings. The maths is that of gru/gru.h.
//
// B rows, C inputs, H units; weights hold the gates r, z, n in this order. Arrays are contiguous
// and row-major unless a stride is given; every pointer is only borrowed for the call; outputs
// overlap neither inputs nor one another. A size may be 0, and then so may be the pointers to
// arrays that it empties. Results are bitwise the same for any num_threads, and a row's do not
// depend on the other rows of its batch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mbm {

struct GruCellInputs {
  int64_t B, C, H;
  const float* x;  // [B, C], row b at x + b * x_stride_b
  int64_t x_stride_b;
  const float* h;     // [B, H]
  const float* w_ih;  // [3H, C]
  const float* w_hh;  // [3H, H]
};

struct GruCellForward {
  GruCellInputs in;
  const float* b_ih;  // [3H] or null
  const float* b_hh;  // [3H] or null
  float* h_new;       // [B, H]
  float* reserve;     // [B, 4H] = r, z, n, W_hn h + b_hn; null if not wanted
};
MBM_PER_ISA(void, gru_cell_forward, (const GruCellForward& args, int num_threads))

struct GruCellBackward {
  GruCellInputs in;         // x is read for grad_w_ih only, w_ih for grad_x, w_hh for grad_h
  const float* reserve;     // of the forward
  const float* grad_h_new;  // [B, H]
  // Each may be null and is then not computed; all are overwritten.
  float* grad_x;     // [B, C]
  float* grad_h;     // [B, H]
  float* grad_w_ih;  // [3H, C]
  float* grad_w_hh;  // [3H, H]
  float* grad_b_ih;  // [3H]
  float* grad_b_hh;  // [3H]
};
MBM_PER_ISA(void, gru_cell_backward, (const GruCellBackward& args, int num_threads))

}  // namespace mbm
