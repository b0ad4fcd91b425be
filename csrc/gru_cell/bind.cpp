// Sizes come first, then the addresses in the order of gru_cell.h; 0 stands for null.
#include "common/bind.h"

#include "common/isa.h"
#include "gru_cell/gru_cell.h"

namespace {

mbm::GruCellInputs gru_cell_inputs(int64_t B, int64_t C, int64_t H, Address x, int64_t x_stride_b,
                                   Address h, Address w_ih, Address w_hh) {
  return {B,
          C,
          H,
          checked_ptr<const float>(x, B * C, "x"),
          x_stride_b,
          checked_ptr<const float>(h, B * H, "h"),
          checked_ptr<const float>(w_ih, 3 * H * C, "w_ih"),
          checked_ptr<const float>(w_hh, 3 * H * H, "w_hh")};
}

void bind_gru_cell(py::module_& m) {
  m.def("gru_cell_forward", [](int64_t B, int64_t C, int64_t H, Address x, int64_t x_stride_b,
                               Address h, Address w_ih, Address w_hh, Address b_ih, Address b_hh,
                               Address h_new, Address reserve, int num_threads) {
    mbm::GruCellForward args{};
    args.in = gru_cell_inputs(B, C, H, x, x_stride_b, h, w_ih, w_hh);
    args.b_ih = optional_ptr<const float>(b_ih, 3 * H, "b_ih");
    args.b_hh = optional_ptr<const float>(b_hh, 3 * H, "b_hh");
    args.h_new = checked_ptr<float>(h_new, B * H, "h_new");
    args.reserve = optional_ptr<float>(reserve, B * 4 * H, "reserve");
    py::gil_scoped_release release;
    MBM_CALL(gru_cell_forward, args, num_threads);
  });
  m.def("gru_cell_backward",
        [](int64_t B, int64_t C, int64_t H, Address x, int64_t x_stride_b, Address h, Address w_ih,
           Address w_hh, Address reserve, Address grad_h_new, Address grad_x, Address grad_h,
           Address grad_w_ih, Address grad_w_hh, Address grad_b_ih, Address grad_b_hh,
           int num_threads) {
          mbm::GruCellBackward args{};
          args.in = gru_cell_inputs(B, C, H, x, x_stride_b, h, w_ih, w_hh);
          args.reserve = checked_ptr<const float>(reserve, B * 4 * H, "reserve");
          args.grad_h_new = checked_ptr<const float>(grad_h_new, B * H, "grad_h_new");
          args.grad_x = optional_ptr<float>(grad_x, B * C, "grad_x");
          args.grad_h = optional_ptr<float>(grad_h, B * H, "grad_h");
          args.grad_w_ih = optional_ptr<float>(grad_w_ih, 3 * H * C, "grad_w_ih");
          args.grad_w_hh = optional_ptr<float>(grad_w_hh, 3 * H * H, "grad_w_hh");
          args.grad_b_ih = optional_ptr<float>(grad_b_ih, 3 * H, "grad_b_ih");
          args.grad_b_hh = optional_ptr<float>(grad_b_hh, 3 * H, "grad_b_hh");
          py::gil_scoped_release release;
          MBM_CALL(gru_cell_backward, args, num_threads);
        });
}

const Binding registered(bind_gru_cell);

}  // namespace
