#include "common/bind.h"

#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "concat_linear/concat_linear.h"

namespace {

// A group as (rows, index, inputs), an input as (x, stride of its rows, features, column, packed
// part, grad_x).
using LinearInput = std::tuple<Address, int64_t, int64_t, int64_t, Address, Address>;
using LinearGroup = std::tuple<int64_t, Address, std::vector<LinearInput>>;

std::vector<mbm::ConcatLinearGroup> linear_groups(const std::vector<LinearGroup>& given, int64_t R,
                                                  int64_t K) {
  std::vector<mbm::ConcatLinearGroup> groups;
  for (const auto& [rows, index, inputs] : given) {
    mbm::ConcatLinearGroup group{rows, optional_ptr<const int64_t>(index, R, "index"), {}};
    for (const auto& [x, stride, features, column, packed, grad_x] : inputs) {
      const int64_t size = MBM_CALL(concat_linear_packed_part_size, K, features);
      group.inputs.push_back({checked_ptr<const float>(x, rows * features, "inputs"), stride,
                              features, column, optional_ptr<const float>(packed, size, "packed"),
                              optional_ptr<float>(grad_x, rows * features, "grad_inputs")});
    }
    groups.push_back(std::move(group));
  }
  return groups;
}

void bind_concat_linear(py::module_& m) {
  m.def("concat_linear_packed_size",
        [](int64_t K, int64_t C) { return MBM_CALL(concat_linear_packed_size, K, C); });
  m.def("concat_linear_packed_part_size", [](int64_t K, int64_t features) {
    return MBM_CALL(concat_linear_packed_part_size, K, features);
  });
  m.def("concat_linear_pack",
        [](int64_t K, int64_t C, Address weight, Address packed, int num_threads) {
          const int64_t size = MBM_CALL(concat_linear_packed_size, K, C);
          const auto* from = checked_ptr<const float>(weight, K * C, "weight");
          auto* to = checked_ptr<float>(packed, size, "packed");
          py::gil_scoped_release release;
          MBM_CALL(concat_linear_pack, K, C, from, to, num_threads);
        });
  m.def("concat_linear_pack_part", [](int64_t K, int64_t C, int64_t column, int64_t features,
                                      Address weight, Address packed, int num_threads) {
    const int64_t size = MBM_CALL(concat_linear_packed_part_size, K, features);
    const auto* from = checked_ptr<const float>(weight, K * C, "weight");
    auto* to = checked_ptr<float>(packed, size, "packed");
    py::gil_scoped_release release;
    MBM_CALL(concat_linear_pack_part, K, C, column, features, from, to, num_threads);
  });
  m.def("concat_linear_fwd", [](int64_t R, int64_t K, int64_t C,
                                const std::vector<LinearGroup>& groups, Address packed,
                                Address bias, Address y, int num_threads) {
    mbm::ConcatLinearForward args{R, K, C, linear_groups(groups, R, K), nullptr, nullptr, nullptr};
    const int64_t size = MBM_CALL(concat_linear_packed_size, K, C);
    args.packed = checked_ptr<const float>(packed, size, "packed");
    args.bias = optional_ptr<const float>(bias, K, "bias");
    args.y = checked_ptr<float>(y, R * K, "y");
    py::gil_scoped_release release;
    MBM_CALL(concat_linear_fwd, args, num_threads);
  });
  m.def("concat_linear_bwd",
        [](int64_t R, int64_t K, int64_t C, const std::vector<LinearGroup>& groups, Address grad_y,
           int64_t grad_y_stride, Address grad_weight, Address grad_bias, int num_threads) {
          mbm::ConcatLinearBackward args{R,       K, C,       linear_groups(groups, R, K),
                                         nullptr, 0, nullptr, nullptr};
          args.grad_y = checked_ptr<const float>(grad_y, R * K, "grad_y");
          args.grad_y_stride = grad_y_stride;
          args.grad_weight = optional_ptr<float>(grad_weight, K * C, "grad_weight");
          args.grad_bias = optional_ptr<float>(grad_bias, K, "grad_bias");
          py::gil_scoped_release release;
          MBM_CALL(concat_linear_bwd, args, num_threads);
        });
}

const Binding registered(bind_concat_linear);

}  // namespace
