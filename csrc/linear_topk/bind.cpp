#include "common/bind.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "common/isa.h"
#include "common/problem_fields.h"
#include "concat_linear/concat_linear.h"
#include "linear_topk/linear_topk.h"

namespace {

#define MBM_LINEAR_TOPK_PROBLEM(FIELD) FIELD(R) FIELD(H) FIELD(V) FIELD(k) FIELD(hidden_stride)

struct LinearTopkProblem {
  MBM_PROBLEM_FIELDS("linear_topk_problem_fields", MBM_LINEAR_TOPK_PROBLEM)

  void check() const {
    mbm::check_field("R", R, 0, mbm::kMostElements);
    mbm::check_field("H", H, 0, mbm::kMostElements);
    mbm::check_field("V", V, 1, (int64_t{1} << 31) - 1);
    mbm::check_field("k", k, 1, std::min(V, mbm::kMostTopk));
  }
};

void bind_linear_topk(py::module_& m) {
  bind_problem_fields<LinearTopkProblem>(m);
  // inputs: hidden, packed weight, bias; outputs: values, ids. The weight is packed as
  // concat_linear's.
  m.def("linear_topk", [](const py::bytes& problem, const std::array<Address, 3>& inputs,
                          const std::array<Address, 2>& outputs, int num_threads) {
    const auto p = mbm::read_block<LinearTopkProblem>(problem);
    const auto [hidden, packed, bias] = inputs;
    const auto [values, ids] = outputs;
    mbm::LinearTopk args{};
    args.R = p.R;
    args.H = p.H;
    args.V = p.V;
    args.k = p.k;
    const int64_t size = MBM_CALL(concat_linear_packed_size, p.V, p.H);
    args.hidden = checked_ptr<const float>(hidden, p.R * p.H, "hidden");
    args.hidden_stride = p.hidden_stride;
    args.packed = checked_ptr<const float>(packed, size, "packed");
    args.bias = optional_ptr<const float>(bias, p.V, "bias");
    args.values = checked_ptr<float>(values, p.R * p.k, "values");
    args.ids = checked_ptr<int64_t>(ids, p.R * p.k, "ids");
    py::gil_scoped_release release;
    MBM_CALL(linear_topk, args, num_threads);
  });
}

const Binding registered(bind_linear_topk);

}  // namespace
