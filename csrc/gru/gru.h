// GRU over a sequence, forward and backward, float32.
//
//   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      T steps, B rows, C inputs, H units
//   z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)      weights hold the gates r, z, n in this order
//   n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
//   h' = n + z * (h - n)
//
// Arrays are contiguous and row-major unless a stride is given; every pointer is only borrowed for
// the call; outputs overlap neither inputs nor one another. A size may be 0, and then so may be the
// pointers to arrays that it empties. Results are bitwise the same for any num_threads, and a row's
// do not depend on the other rows of its batch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mbm {

// Floats in each packed form below, of the ISA in use; repack when that changes.
struct GruPackedSizes {
  int64_t forward;    // input and recurrent weights, the three gates of a unit block side by side
  int64_t recurrent;  // W_hh for grad_h = grad_gates W_hh
  int64_t input;      // W_ih for grad_x = grad_gates W_ih
};
MBM_PER_ISA(GruPackedSizes, gru_packed_sizes, (int64_t C, int64_t H))

// w_ih [3H, C], w_hh [3H, H], b_ih and b_hh [3H] or null; out [sizes.forward].
MBM_PER_ISA(void, gru_pack_forward,
            (int64_t C, int64_t H, const float* w_ih, const float* w_hh, const float* b_ih,
             const float* b_hh, float* out, int num_threads))
// w_hh [3H, H]; out [sizes.recurrent].
MBM_PER_ISA(void, gru_pack_recurrent, (int64_t H, const float* w_hh, float* out, int num_threads))
// w_ih [3H, C]; out [sizes.input].
MBM_PER_ISA(void, gru_pack_input,
            (int64_t C, int64_t H, const float* w_ih, float* out, int num_threads))

struct GruSequence {
  int64_t T, B, C, H;
  const float* x;  // [T, B, C], element (t, b, c) at t * x_stride_t + b * x_stride_b + c
  int64_t x_stride_t, x_stride_b;
  const float* h0;         // [B, H], or null for zeros
  const int64_t* lengths;  // [B], values outside 0..T are clamped; null: every row has T steps
  bool reverse;            // from a row's last valid step to its first
};

// The saved state is one row [4H] = r, z, n, W_hn h + b_hn for each valid (t, b): steps rising, and
// within a step the rows by falling length (equal lengths keep their order). sum(lengths) rows are
// written, T * B without lengths.
struct GruForward {
  GruSequence sequence;
  const float* packed;  // gru_pack_forward
  float* y;             // [T, B, H], 0 past a row's length; null if not wanted
  int64_t y_stride;     // row (t, b) of y at (t B + b) y_stride
  float* h_n;           // [B, H], the state after a row's last step; h0 for a row without steps
  float* reserve;       // the saved state, room for T * B rows of 4H; null if not wanted
};
// One direction, or two that write apart: an even number of threads then runs both at once.
MBM_PER_ISA(void, gru_forward, (const GruForward* directions, int count, int num_threads))

struct GruBackward {
  GruSequence sequence;           // as given to the forward; x is read for grad_w_ih only
  const float* packed_recurrent;  // gru_pack_recurrent
  const float* packed_input;      // gru_pack_input; null if grad_x is
  const float* y;                 // of the forward, rows y_stride apart; may be null if T == 1
  int64_t y_stride;
  const float* reserve;  // of the forward
  const float* grad_y;   // [T, B, H] with the strides below, or null for zeros
  int64_t grad_y_stride_t, grad_y_stride_b;
  const float* grad_h_n;  // [B, H], or null for zeros
  // Each may be null and is then not computed; all are overwritten, but see add_grad_x.
  float* grad_x;     // [T, B, C], 0 past a row's length
  float* grad_h0;    // [B, H]
  float* grad_w_ih;  // [3H, C]
  float* grad_w_hh;  // [3H, H]
  float* grad_b_ih;  // [3H]
  float* grad_b_hh;  // [3H]
  bool add_grad_x;   // to what grad_x holds
};
// One direction, or two as above; grad_x of the first is complete before the second's.
MBM_PER_ISA(void, gru_backward, (const GruBackward* directions, int count, int num_threads))

}  // namespace mbm
