// What is the same in every call of a GRU, of one direction or of both: one block, filled once
// (problem.py), from which a direction's arguments are made with the addresses of the tensors. Of
// two directions each array but x, the weights and their gradients holds both: [2, B, H] states,
// [2, T, B, 4H] saved, [T, B, 2H] y. Only the binding reads it.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/checked_ptr.h"
#include "common/isa.h"
#include "common/problem_block.h"
#include "gru/gru.h"

namespace mbm {

// Sizes; 1 or 2 directions, the first of which runs in reverse or not; strides of x in elements.
#define MBM_GRU_PROBLEM(FIELD) \
  FIELD(T) FIELD(B) FIELD(C) FIELD(H) FIELD(directions) FIELD(reverse) FIELD(x_t) FIELD(x_b)

struct GruProblem {
  MBM_PROBLEM_FIELDS("gru_problem_fields", MBM_GRU_PROBLEM)

  void check() const {
    for (int64_t size : {T, B, C, H})
      if (size < 0) throw std::invalid_argument("problem: got a negative size");
    if (directions != 1 && directions != 2)
      throw std::invalid_argument("problem: got " + std::to_string(directions) +
                                  " directions; expected 1 or 2");
  }

  int64_t rows() const { return T * B; }
  int64_t width() const { return directions * H; }       // of y
  int64_t states() const { return directions * B * H; }  // of h0 and h_n
  int64_t saved() const { return rows() * 4 * width(); }
};

// Addresses, 0 for null.
struct GruInputs {
  uintptr_t x, h0, lengths;
};
struct GruOutputs {
  uintptr_t y, h_n, reserve;
};
struct GruBackwardInputs {
  GruInputs forward;
  uintptr_t y, reserve;
};
struct GruGradOutputs {
  uintptr_t y;
  int64_t y_stride_t, y_stride_b;
  uintptr_t h_n;
};
struct GruPackedWeights {
  uintptr_t recurrent, input;
};
struct GruGradInputs {
  uintptr_t x, h0;
};
struct GruGradWeights {
  uintptr_t w_ih, w_hh, b_ih, b_hh;
};

template <class T>
T* moved(T* pointer, int64_t by) {
  return pointer ? pointer + by : nullptr;
}

// Of direction d, 0 or 1, as all below.
inline GruSequence gru_sequence(const GruProblem& p, int64_t d, const float* x,
                                const GruInputs& in) {
  GruSequence sequence{p.T, p.B, p.C, p.H, x, p.x_t, p.x_b, nullptr, nullptr, p.reverse != 0};
  sequence.h0 = moved(optional_ptr<const float>(in.h0, p.states(), "h0"), d * p.B * p.H);
  sequence.lengths = optional_ptr<const int64_t>(in.lengths, p.B, "lengths");
  if (d == 1) sequence.reverse = !sequence.reverse;
  return sequence;
}

inline GruForward gru_forward_args(const GruProblem& p, int64_t d, const GruInputs& in,
                                   uintptr_t packed, const GruOutputs& out) {
  const auto* x = checked_ptr<const float>(in.x, p.rows() * p.C, "x");
  GruForward args{};
  args.sequence = gru_sequence(p, d, x, in);
  args.packed =
      checked_ptr<const float>(packed, MBM_CALL(gru_packed_sizes, p.C, p.H).forward, "packed");
  args.y = moved(optional_ptr<float>(out.y, p.rows() * p.width(), "y"), d * p.H);
  args.y_stride = p.width();
  args.h_n = moved(checked_ptr<float>(out.h_n, p.states(), "h_n"), d * p.B * p.H);
  args.reserve =
      moved(optional_ptr<float>(out.reserve, p.saved(), "reserve"), d * p.rows() * 4 * p.H);
  return args;
}

// The gradients of both directions' weights say whether x is read.
template <class GradWeights>
const float* backward_x(const GruProblem& p, uintptr_t x, const GradWeights& grads) {
  bool read = false;
  for (const GruGradWeights& of : grads) read = read || of.w_ih != 0;
  return checked_ptr<const float>(x, read ? p.rows() * p.C : 0, "x");
}

inline GruBackward gru_backward_args(const GruProblem& p, int64_t d, const float* x,
                                     const GruBackwardInputs& in, const GruGradOutputs& arriving,
                                     const GruGradInputs& grads) {
  const int64_t rows = p.rows(), state = d * p.B * p.H;
  GruBackward args{};
  args.sequence = gru_sequence(p, d, x, in.forward);
  args.y = moved(checked_ptr<const float>(in.y, p.T > 1 ? rows * p.width() : 0, "y"), d * p.H);
  args.y_stride = p.width();
  args.reserve =
      moved(checked_ptr<const float>(in.reserve, p.saved(), "reserve"), d * rows * 4 * p.H);
  args.grad_y = moved(optional_ptr<const float>(arriving.y, rows * p.width(), "grad_y"), d * p.H);
  args.grad_y_stride_t = arriving.y_stride_t;
  args.grad_y_stride_b = arriving.y_stride_b;
  args.grad_h_n = moved(optional_ptr<const float>(arriving.h_n, p.states(), "grad_h_n"), state);
  args.grad_x = optional_ptr<float>(grads.x, rows * p.C, "grad_x");
  args.grad_h0 = moved(optional_ptr<float>(grads.h0, p.states(), "grad_h0"), state);
  args.add_grad_x = d == 1;
  return args;
}

inline void set_weights(GruBackward& args, const GruPackedWeights& packed,
                        const GruGradWeights& grads) {
  const int64_t C = args.sequence.C, H = args.sequence.H;
  const GruPackedSizes sizes = MBM_CALL(gru_packed_sizes, C, H);
  args.packed_recurrent =
      checked_ptr<const float>(packed.recurrent, sizes.recurrent, "packed_recurrent");
  args.packed_input =
      checked_ptr<const float>(packed.input, args.grad_x ? sizes.input : 0, "packed_input");
  args.grad_w_ih = optional_ptr<float>(grads.w_ih, 3 * H * C, "grad_w_ih");
  args.grad_w_hh = optional_ptr<float>(grads.w_hh, 3 * H * H, "grad_w_hh");
  args.grad_b_ih = optional_ptr<float>(grads.b_ih, 3 * H, "grad_b_ih");
  args.grad_b_hh = optional_ptr<float>(grads.b_hh, 3 * H, "grad_b_hh");
}

}  // namespace mbm
