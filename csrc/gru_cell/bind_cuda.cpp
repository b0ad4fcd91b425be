#include <limits>
#include <string_view>

#include "common/gpu/bind.h"
#include "common/problem_fields.h"
#include "gru_cell/gru_cell_cuda.h"

namespace {

using mbm::gpu::optional_pointer;
using mbm::gpu::optional_writable;
using mbm::gpu::Place;
using mbm::gpu::pointer;
using mbm::gpu::writable;

// clang-format off
#define MBM_GRU_CELL_CUDA_PROBLEM(FIELD) FIELD(B) FIELD(C) FIELD(H) FIELD(dtype) FIELD(x_b) FIELD(h_b)
// clang-format on

struct Problem {
  MBM_PROBLEM_FIELDS("gru_cell_cuda_problem_fields", MBM_GRU_CELL_CUDA_PROBLEM)

  void check() const {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
    for (int64_t size : {B, C, H}) mbm::check_field("a size", size, 0, kMost);
    mbm::check_field("dtype", dtype, 0, 2);
  }
};

// inputs: x, h, w_ih, w_hh, b_ih, b_hh; outputs: h_new, reserve.
void forward(const py::bytes& problem, const Addresses<6>& inputs, const Addresses<2>& outputs,
             const Place& place) {
  const auto p = mbm::read_block<Problem>(std::string_view(problem));
  const auto [x, h, w_ih, w_hh, b_ih, b_hh] = inputs;
  mbm::GruCellCudaForward args{};
  args.B = p.B;
  args.C = p.C;
  args.H = p.H;
  args.dtype = static_cast<mbm::gpu::Dtype>(p.dtype);
  args.x = pointer(x, p.dtype, p.B * p.C, "x");
  args.x_b = p.x_b;
  args.h = pointer(h, p.dtype, p.B * p.H, "h");
  args.h_b = p.h_b;
  args.w_ih = pointer(w_ih, p.dtype, 3 * p.H * p.C, "w_ih");
  args.w_hh = pointer(w_hh, p.dtype, 3 * p.H * p.H, "w_hh");
  args.b_ih = optional_pointer(b_ih, p.dtype, 3 * p.H, "b_ih");
  args.b_hh = optional_pointer(b_hh, p.dtype, 3 * p.H, "b_hh");
  args.h_new = writable(outputs[0], p.dtype, p.B * p.H, "h_new");
  args.reserve = optional_writable(outputs[1], p.dtype, 4 * p.B * p.H, "reserve");
  mbm::gpu::run(mbm::gru_cell_cuda_fwd, args, place, "gru_cell");
}

// inputs: the gradient of h_new, h, reserve; outputs: gates, direct.
void backward(const py::bytes& problem, const Addresses<3>& inputs, int64_t grad_b,
              const Addresses<2>& outputs, const Place& place) {
  const auto p = mbm::read_block<Problem>(std::string_view(problem));
  const auto [grad_h_new, h, reserve] = inputs;
  mbm::GruCellCudaBackward args{};
  args.B = p.B;
  args.H = p.H;
  args.dtype = static_cast<mbm::gpu::Dtype>(p.dtype);
  args.grad_h_new = pointer(grad_h_new, p.dtype, p.B * p.H, "grad_h_new");
  args.grad_b = grad_b;
  args.h = pointer(h, p.dtype, p.B * p.H, "h");
  args.h_b = p.h_b;
  args.reserve = pointer(reserve, p.dtype, 4 * p.B * p.H, "reserve");
  args.gates = writable(outputs[0], p.dtype, 4 * p.B * p.H, "gates");
  args.direct = optional_writable(outputs[1], p.dtype, p.B * p.H, "direct");
  mbm::gpu::run(mbm::gru_cell_cuda_bwd, args, place, "gru_cell");
}

void bind_gru_cell(py::module_& m) {
  bind_problem_fields<Problem>(m);
  m.def("gru_cell_cuda_fwd", &forward);
  m.def("gru_cell_cuda_bwd", &backward);
}

const Binding registered(bind_gru_cell);

}  // namespace
