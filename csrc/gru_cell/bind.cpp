// Calls take the block of gru_cell_problem.h, then tuples of addresses; 0 stands for null.
#include "common/bind.h"

#include <pybind11/stl.h>

#include <array>

#include "common/isa.h"
#include "gru_cell/gru_cell_problem.h"

namespace {

void bind_gru_cell(py::module_& m) {
  bind_problem_fields<mbm::GruCellProblem>(m);
  // inputs: x, h, w_ih, w_hh, b_ih, b_hh; outputs: h_new, reserve.
  m.def("gru_cell_forward", [](const py::bytes& problem, const Addresses<6>& inputs,
                               const Addresses<2>& outputs, int num_threads) {
    const auto p = mbm::read_block<mbm::GruCellProblem>(problem);
    const auto [x, h, w_ih, w_hh, b_ih, b_hh] = inputs;
    mbm::GruCellForward args{};
    args.in = mbm::gru_cell_inputs(p, {x, h, w_ih, w_hh});
    args.b_ih = optional_ptr<const float>(b_ih, 3 * p.H, "b_ih");
    args.b_hh = optional_ptr<const float>(b_hh, 3 * p.H, "b_hh");
    args.h_new = checked_ptr<float>(outputs[0], p.B * p.H, "h_new");
    args.reserve = optional_ptr<float>(outputs[1], p.B * 4 * p.H, "reserve");
    py::gil_scoped_release release;
    MBM_CALL(gru_cell_forward, args, num_threads);
  });
  // inputs: x, h, w_ih, w_hh, reserve, the gradient of h_new; grads: of x, h, w_ih, w_hh, b_ih,
  // b_hh.
  m.def("gru_cell_backward", [](const py::bytes& problem, const Addresses<6>& inputs,
                                const Addresses<6>& grads, int num_threads) {
    const auto p = mbm::read_block<mbm::GruCellProblem>(problem);
    const auto [x, h, w_ih, w_hh, reserve, grad_h_new] = inputs;
    const auto [grad_x, grad_h, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh] = grads;
    mbm::GruCellBackward args{};
    args.in = mbm::gru_cell_inputs(p, {x, h, w_ih, w_hh});
    args.reserve = checked_ptr<const float>(reserve, p.B * 4 * p.H, "reserve");
    args.grad_h_new = checked_ptr<const float>(grad_h_new, p.B * p.H, "grad_h_new");
    args.grad_x = optional_ptr<float>(grad_x, p.B * p.C, "grad_x");
    args.grad_h = optional_ptr<float>(grad_h, p.B * p.H, "grad_h");
    args.grad_w_ih = optional_ptr<float>(grad_w_ih, 3 * p.H * p.C, "grad_w_ih");
    args.grad_w_hh = optional_ptr<float>(grad_w_hh, 3 * p.H * p.H, "grad_w_hh");
    args.grad_b_ih = optional_ptr<float>(grad_b_ih, 3 * p.H, "grad_b_ih");
    args.grad_b_hh = optional_ptr<float>(grad_b_hh, 3 * p.H, "grad_b_hh");
    py::gil_scoped_release release;
    MBM_CALL(gru_cell_backward, args, num_threads);
  });
}

const Binding registered(bind_gru_cell);

}  // namespace
