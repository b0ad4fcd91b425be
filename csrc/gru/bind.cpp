// What is packed of weights takes its sizes first, then addresses in the order of gru.h. Calls take
// the block of gru_problem.h, then tuples of addresses, where those of weights stand in a list of
// one for each direction; 0 stands for null.
#include "common/bind.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "common/isa.h"
#include "gru/gru_problem.h"

namespace {

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
  bind_problem_fields<mbm::GruProblem>(m);
  // inputs: x, h0, lengths; packed: gru_pack_forward's; outputs: y, h_n, reserve.
  m.def("gru_forward", [](const py::bytes& problem, const Addresses<3>& inputs,
                          const std::vector<Address>& packed, const Addresses<3>& outputs,
                          int num_threads) {
    const auto p = mbm::read_block<mbm::GruProblem>(problem);
    const auto [x, h0, lengths] = inputs;
    const auto [y, h_n, reserve] = outputs;
    std::vector<mbm::GruForward> directions;
    for (int64_t d = 0; d < p.directions; ++d)
      directions.push_back(mbm::gru_forward_args(
          p, d, {x, h0, lengths}, packed.at(static_cast<size_t>(d)), {y, h_n, reserve}));
    py::gil_scoped_release release;
    MBM_CALL(gru_forward, directions.data(), static_cast<int>(directions.size()), num_threads);
  });
  // inputs: x, h0, lengths, y, reserve; arriving: the gradient of y, its strides of T and B, the
  // gradient of h_n; packed: gru_pack_recurrent's and gru_pack_input's; grads: of x, h0;
  // grad_weights: of w_ih, w_hh, b_ih, b_hh.
  m.def("gru_backward", [](const py::bytes& problem, const Addresses<5>& inputs,
                           const Addresses<4>& arriving, const std::vector<Addresses<2>>& packed,
                           const Addresses<2>& grads, const std::vector<Addresses<4>>& grad_weights,
                           int num_threads) {
    const auto p = mbm::read_block<mbm::GruProblem>(problem);
    const auto [x, h0, lengths, y, reserve] = inputs;
    const auto [grad_y, stride_t, stride_b, grad_h_n] = arriving;
    std::vector<mbm::GruGradWeights> weights;
    for (const auto& [w_ih, w_hh, b_ih, b_hh] : grad_weights)
      weights.push_back({w_ih, w_hh, b_ih, b_hh});
    const float* x_ptr = mbm::backward_x(p, x, weights);
    std::vector<mbm::GruBackward> directions;
    for (int64_t d = 0; d < p.directions; ++d) {
      const auto [recurrent, input] = packed.at(static_cast<size_t>(d));
      directions.push_back(mbm::gru_backward_args(
          p, d, x_ptr, {{x, h0, lengths}, y, reserve},
          {grad_y, static_cast<int64_t>(stride_t), static_cast<int64_t>(stride_b), grad_h_n},
          {grads[0], grads[1]}));
      mbm::set_weights(directions.back(), {recurrent, input}, weights.at(static_cast<size_t>(d)));
    }
    py::gil_scoped_release release;
    MBM_CALL(gru_backward, directions.data(), static_cast<int>(directions.size()), num_threads);
  });
}

void bind_gru(py::module_& m) {
  bind_packing(m);
  bind_sequence(m);
}

const Binding registered(bind_gru);

}  // namespace
