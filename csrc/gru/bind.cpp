// Sizes come first, then the addresses in the order of gru.h; 0 stands for null. Of two directions
// each array but the weights and their gradients holds both: [2, B, H] states, [2, T, B, 4H] saved,
// [T, B, 2H] y.
#include "common/bind.h"

#include <tuple>

#include "common/isa.h"
#include "gru/gru.h"

namespace {

template <class T>
T* moved(T* pointer, int64_t by) {
  return pointer ? pointer + by : nullptr;
}

// Of the second direction.
mbm::GruSequence other_direction(mbm::GruSequence given) {
  given.h0 = moved(given.h0, given.B * given.H);
  given.reverse = !given.reverse;
  return given;
}

mbm::GruSequence gru_sequence(int64_t T, int64_t B, int64_t C, int64_t H, const float* x,
                              int64_t x_stride_t, int64_t x_stride_b, Address h0, Address lengths,
                              bool reverse, int64_t directions) {
  return {T,
          B,
          C,
          H,
          x,
          x_stride_t,
          x_stride_b,
          optional_ptr<const float>(h0, directions * B * H, "h0"),
          optional_ptr<const int64_t>(lengths, B, "lengths"),
          reverse};
}

mbm::GruForward gru_forward_args(const mbm::GruSequence& s, Address packed, Address y, Address h_n,
                                 Address reserve, int64_t directions) {
  const int64_t packed_size = MBM_CALL(gru_packed_sizes, s.C, s.H).forward;
  return {s,
          checked_ptr<const float>(packed, packed_size, "packed"),
          optional_ptr<float>(y, s.T * s.B * directions * s.H, "y"),
          directions * s.H,
          checked_ptr<float>(h_n, directions * s.B * s.H, "h_n"),
          optional_ptr<float>(reserve, directions * s.T * s.B * 4 * s.H, "reserve")};
}

using WeightGradients = std::tuple<Address, Address, Address, Address>;  // w_ih, w_hh, b_ih, b_hh

void set_weights(mbm::GruBackward& args, Address packed_recurrent, Address packed_input,
                 const WeightGradients& grads) {
  const int64_t C = args.sequence.C, H = args.sequence.H;
  const mbm::GruPackedSizes sizes = MBM_CALL(gru_packed_sizes, C, H);
  args.packed_recurrent =
      checked_ptr<const float>(packed_recurrent, sizes.recurrent, "packed_recurrent");
  args.packed_input =
      checked_ptr<const float>(packed_input, args.grad_x ? sizes.input : 0, "packed_input");
  const auto& [w_ih, w_hh, b_ih, b_hh] = grads;
  args.grad_w_ih = optional_ptr<float>(w_ih, 3 * H * C, "grad_w_ih");
  args.grad_w_hh = optional_ptr<float>(w_hh, 3 * H * H, "grad_w_hh");
  args.grad_b_ih = optional_ptr<float>(b_ih, 3 * H, "grad_b_ih");
  args.grad_b_hh = optional_ptr<float>(b_hh, 3 * H, "grad_b_hh");
}

mbm::GruBackward gru_backward_args(const mbm::GruSequence& s, Address y, Address reserve,
                                   Address grad_y, int64_t grad_y_stride_t, int64_t grad_y_stride_b,
                                   Address grad_h_n, Address grad_x, Address grad_h0,
                                   int64_t directions) {
  mbm::GruBackward args{};
  args.sequence = s;
  const int64_t rows = s.T * s.B, width = directions * s.H, states = directions * s.B * s.H;
  args.y = checked_ptr<const float>(y, s.T > 1 ? rows * width : 0, "y");
  args.y_stride = width;
  args.reserve = checked_ptr<const float>(reserve, rows * 4 * width, "reserve");
  args.grad_y = optional_ptr<const float>(grad_y, rows * width, "grad_y");
  args.grad_y_stride_t = grad_y_stride_t;
  args.grad_y_stride_b = grad_y_stride_b;
  args.grad_h_n = optional_ptr<const float>(grad_h_n, states, "grad_h_n");
  args.grad_x = optional_ptr<float>(grad_x, rows * s.C, "grad_x");
  args.grad_h0 = optional_ptr<float>(grad_h0, states, "grad_h0");
  return args;
}

void bind_packing(py::module_& m) {
  m.def("gru_packed_sizes", [](int64_t C, int64_t H) {
    const mbm::GruPackedSizes sizes = MBM_CALL(gru_packed_sizes, C, H);
    return py::make_tuple(sizes.forward, sizes.recurrent, sizes.input);
  });
  m.def("gru_pack_forward", [](int64_t C, int64_t H, Address w_ih, Address w_hh, Address b_ih,
                               Address b_hh, Address out, int num_threads) {
    const auto* w_ih_ptr = checked_ptr<const float>(w_ih, 3 * H * C, "w_ih");
    const auto* w_hh_ptr = checked_ptr<const float>(w_hh, 3 * H * H, "w_hh");
    const auto* b_ih_ptr = optional_ptr<const float>(b_ih, 3 * H, "b_ih");
    const auto* b_hh_ptr = optional_ptr<const float>(b_hh, 3 * H, "b_hh");
    auto* out_ptr = checked_ptr<float>(out, MBM_CALL(gru_packed_sizes, C, H).forward, "out");
    py::gil_scoped_release release;
    MBM_CALL(gru_pack_forward, C, H, w_ih_ptr, w_hh_ptr, b_ih_ptr, b_hh_ptr, out_ptr, num_threads);
  });
  m.def("gru_pack_recurrent", [](int64_t H, Address w_hh, Address out, int num_threads) {
    const auto* w_hh_ptr = checked_ptr<const float>(w_hh, 3 * H * H, "w_hh");
    auto* out_ptr = checked_ptr<float>(out, MBM_CALL(gru_packed_sizes, 0, H).recurrent, "out");
    py::gil_scoped_release release;
    MBM_CALL(gru_pack_recurrent, H, w_hh_ptr, out_ptr, num_threads);
  });
  m.def("gru_pack_input", [](int64_t C, int64_t H, Address w_ih, Address out, int num_threads) {
    const auto* w_ih_ptr = checked_ptr<const float>(w_ih, 3 * H * C, "w_ih");
    auto* out_ptr = checked_ptr<float>(out, MBM_CALL(gru_packed_sizes, C, H).input, "out");
    py::gil_scoped_release release;
    MBM_CALL(gru_pack_input, C, H, w_ih_ptr, out_ptr, num_threads);
  });
}

void bind_sequence(py::module_& m) {
  m.def("gru_forward", [](int64_t T, int64_t B, int64_t C, int64_t H, Address x, int64_t x_stride_t,
                          int64_t x_stride_b, Address h0, Address packed, Address lengths,
                          bool reverse, Address y, Address h_n, Address reserve, int num_threads) {
    const auto* x_ptr = checked_ptr<const float>(x, T * B * C, "x");
    const mbm::GruForward args = gru_forward_args(
        gru_sequence(T, B, C, H, x_ptr, x_stride_t, x_stride_b, h0, lengths, reverse, 1), packed, y,
        h_n, reserve, 1);
    py::gil_scoped_release release;
    MBM_CALL(gru_forward, &args, 1, num_threads);
  });
  m.def("gru_backward", [](int64_t T, int64_t B, int64_t C, int64_t H, Address x,
                           int64_t x_stride_t, int64_t x_stride_b, Address h0,
                           Address packed_recurrent, Address packed_input, Address lengths,
                           bool reverse, Address y, Address reserve, Address grad_y,
                           int64_t grad_y_stride_t, int64_t grad_y_stride_b, Address grad_h_n,
                           Address grad_x, Address grad_h0, Address grad_w_ih, Address grad_w_hh,
                           Address grad_b_ih, Address grad_b_hh, int num_threads) {
    const auto* x_ptr = checked_ptr<const float>(x, grad_w_ih ? T * B * C : 0, "x");
    mbm::GruBackward args = gru_backward_args(
        gru_sequence(T, B, C, H, x_ptr, x_stride_t, x_stride_b, h0, lengths, reverse, 1), y,
        reserve, grad_y, grad_y_stride_t, grad_y_stride_b, grad_h_n, grad_x, grad_h0, 1);
    set_weights(args, packed_recurrent, packed_input, {grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh});
    py::gil_scoped_release release;
    MBM_CALL(gru_backward, &args, 1, num_threads);
  });
}

void bind_bidirectional(py::module_& m) {
  m.def("gru_bidirectional_forward",
        [](int64_t T, int64_t B, int64_t C, int64_t H, Address x, int64_t x_stride_t,
           int64_t x_stride_b, Address h0, Address packed, Address packed_reverse, Address lengths,
           Address y, Address h_n, Address reserve, int num_threads) {
          const auto* x_ptr = checked_ptr<const float>(x, T * B * C, "x");
          const mbm::GruSequence sequence =
              gru_sequence(T, B, C, H, x_ptr, x_stride_t, x_stride_b, h0, lengths, false, 2);
          const mbm::GruForward first = gru_forward_args(sequence, packed, y, h_n, reserve, 2);
          mbm::GruForward second =
              gru_forward_args(other_direction(sequence), packed_reverse, y, h_n, reserve, 2);
          second.y = moved(first.y, H);
          second.h_n = moved(first.h_n, B * H);
          second.reserve = moved(first.reserve, T * B * 4 * H);
          const mbm::GruForward directions[] = {first, second};
          py::gil_scoped_release release;
          MBM_CALL(gru_forward, directions, 2, num_threads);
        });
  m.def("gru_bidirectional_backward",
        [](int64_t T, int64_t B, int64_t C, int64_t H, Address x, int64_t x_stride_t,
           int64_t x_stride_b, Address h0, Address packed_recurrent,
           Address packed_recurrent_reverse, Address packed_input, Address packed_input_reverse,
           Address lengths, Address y, Address reserve, Address grad_y, int64_t grad_y_stride_t,
           int64_t grad_y_stride_b, Address grad_h_n, Address grad_x, Address grad_h0,
           const WeightGradients& grads, const WeightGradients& grads_reverse, int num_threads) {
          const bool reads_x = std::get<0>(grads) != 0 || std::get<0>(grads_reverse) != 0;
          const auto* x_ptr = checked_ptr<const float>(x, reads_x ? T * B * C : 0, "x");
          mbm::GruBackward first = gru_backward_args(
              gru_sequence(T, B, C, H, x_ptr, x_stride_t, x_stride_b, h0, lengths, false, 2), y,
              reserve, grad_y, grad_y_stride_t, grad_y_stride_b, grad_h_n, grad_x, grad_h0, 2);
          mbm::GruBackward second = first;
          second.sequence = other_direction(first.sequence);
          second.y = moved(first.y, H);
          second.reserve = moved(first.reserve, T * B * 4 * H);
          second.grad_y = moved(first.grad_y, H);
          second.grad_h_n = moved(first.grad_h_n, B * H);
          second.grad_h0 = moved(first.grad_h0, B * H);
          second.add_grad_x = true;
          set_weights(first, packed_recurrent, packed_input, grads);
          set_weights(second, packed_recurrent_reverse, packed_input_reverse, grads_reverse);
          const mbm::GruBackward directions[] = {first, second};
          py::gil_scoped_release release;
          MBM_CALL(gru_backward, directions, 2, num_threads);
        });
}

void bind_gru(py::module_& m) {
  bind_packing(m);
  bind_sequence(m);
  bind_bidirectional(m);
}

const Binding registered(bind_gru);

}  // namespace
