#include "common/bind.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/problem_fields.h"
#include "concat_linear/concat_linear.h"

namespace {

#define MBM_CONCAT_LINEAR_PROBLEM(FIELD) FIELD(R) FIELD(K) FIELD(C) FIELD(inputs) FIELD(groups)
// Of each input; those of a group follow one another. rows are the group's.
#define MBM_CONCAT_LINEAR_INPUT(FIELD) \
  FIELD(group) FIELD(rows) FIELD(features) FIELD(column) FIELD(stride)

struct ConcatLinearProblem {
  MBM_PROBLEM_FIELDS("concat_linear_problem_fields", MBM_CONCAT_LINEAR_PROBLEM)

  void check() const {
    for (const int64_t size : {R, K, C, inputs, groups})
      mbm::check_field("a size", size, 0, mbm::kMostElements);
  }
};

struct ConcatLinearInputProblem {
  MBM_PROBLEM_FIELDS("concat_linear_input_fields", MBM_CONCAT_LINEAR_INPUT)

  void check() const {
    for (const int64_t size : {rows, features, column})
      mbm::check_field("a size of an input", size, 0, mbm::kMostElements);
  }
};

using Addresses = std::vector<Address>;

Address at(const Addresses& addresses, size_t i) { return addresses.empty() ? 0 : addresses[i]; }

void check_count(const char* name, size_t got, int64_t expected) {
  mbm::check_field(name, static_cast<int64_t>(got), expected, expected);
}

// The problem's block is followed by one for each input. indices: of each group, 0 for none. packed
// parts and gradients: of each input, or none at all.
std::vector<mbm::ConcatLinearGroup> linear_groups(const ConcatLinearProblem& p,
                                                  std::string_view blocks, const Addresses& inputs,
                                                  const Addresses& indices, const Addresses& packed,
                                                  const Addresses& grads) {
  constexpr size_t kSize = sizeof(ConcatLinearInputProblem);
  check_count("addresses of inputs", inputs.size(), p.inputs);
  check_count("addresses of indices", indices.size(), p.groups);
  if (!packed.empty()) check_count("addresses of packed parts", packed.size(), p.inputs);
  if (!grads.empty()) check_count("addresses of gradients", grads.size(), p.inputs);
  check_count("bytes of inputs", blocks.size(), p.inputs * static_cast<int64_t>(kSize));
  std::vector<mbm::ConcatLinearGroup> groups;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto in = mbm::read_block<ConcatLinearInputProblem>(blocks.substr(i * kSize, kSize));
    const auto last = static_cast<int64_t>(groups.size()) - 1;
    mbm::check_field("group", in.group, i == 0 ? 0 : last, std::min(last + 1, p.groups - 1));
    mbm::check_field("column", in.column, 0, p.C - in.features);
    if (in.group > last) {
      const Address index = indices[groups.size()];
      mbm::check_field("rows without an index", in.rows, index ? 0 : p.R,
                       index ? mbm::kMostElements : p.R);
      groups.push_back({in.rows, optional_ptr<const int64_t>(index, p.R, "index"), {}});
    }
    mbm::check_field("rows of an input", in.rows, groups.back().rows, groups.back().rows);
    const int64_t count = in.rows * in.features;
    const int64_t size = MBM_CALL(concat_linear_packed_part_size, p.K, in.features);
    groups.back().inputs.push_back({checked_ptr<const float>(inputs[i], count, "inputs"), in.stride,
                                    in.features, in.column,
                                    optional_ptr<const float>(at(packed, i), size, "packed"),
                                    optional_ptr<float>(at(grads, i), count, "grad_inputs")});
  }
  return groups;
}

// The head of the blocks, and what follows it.
std::pair<ConcatLinearProblem, std::string_view> linear_problem(std::string_view blocks) {
  constexpr size_t kSize = sizeof(ConcatLinearProblem);
  return {mbm::read_block<ConcatLinearProblem>(blocks.substr(0, kSize)),
          blocks.size() > kSize ? blocks.substr(kSize) : std::string_view{}};
}

// Null for 0. What reads it so knows no repeated rows.
const float* weight_as_it_is(Address weight, const ConcatLinearProblem& p,
                             const Addresses& indices) {
  if (weight != 0)
    for (const Address index : indices)
      mbm::check_field("an index beside an unpacked weight", index != 0, 0, 0);
  return optional_ptr<const float>(weight, p.K * p.C, "weight");
}

void bind_concat_linear(py::module_& m) {
  bind_problem_fields<ConcatLinearProblem>(m);
  bind_problem_fields<ConcatLinearInputProblem>(m);
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
  // weights: packed weight, or the weight as it is for few rows; bias.
  m.def("concat_linear_fwd",
        [](const py::bytes& blocks, const Addresses& inputs, const Addresses& indices,
           const std::array<Address, 3>& weights, Address y, int num_threads) {
          const auto [p, rest] = linear_problem(blocks);
          const auto [packed, weight, bias] = weights;
          mbm::ConcatLinearForward args{};
          args.R = p.R, args.K = p.K, args.C = p.C;
          args.groups = linear_groups(p, rest, inputs, indices, {}, {});
          args.weight = weight_as_it_is(weight, p, indices);
          const int64_t size = MBM_CALL(concat_linear_packed_size, p.K, p.C);
          if (!args.weight) args.packed = checked_ptr<const float>(packed, size, "packed");
          args.bias = optional_ptr<const float>(bias, p.K, "bias");
          args.y = checked_ptr<float>(y, p.R * p.K, "y");
          py::gil_scoped_release release;
          MBM_CALL(concat_linear_fwd, args, num_threads);
        });
  // packed: parts of the weight, or none, and then the weight as it is for few rows, or 0. grad_y:
  // address, stride of its rows; grads: of the inputs, then of weight and bias.
  m.def("concat_linear_bwd",
        [](const py::bytes& blocks, const Addresses& inputs, const Addresses& indices,
           const std::tuple<Addresses, Address>& packed, const std::tuple<Address, int64_t>& grad_y,
           const Addresses& grad_inputs, const std::array<Address, 2>& grads, int num_threads) {
          const auto [p, rest] = linear_problem(blocks);
          const auto [grad_weight, grad_bias] = grads;
          const auto& [parts, weight] = packed;
          mbm::ConcatLinearBackward args{};
          args.R = p.R, args.K = p.K, args.C = p.C;
          args.groups = linear_groups(p, rest, inputs, indices, parts, grad_inputs);
          args.weight = weight_as_it_is(weight, p, indices);
          args.grad_y = checked_ptr<const float>(std::get<0>(grad_y), p.R * p.K, "grad_y");
          args.grad_y_stride = std::get<1>(grad_y);
          args.grad_weight = optional_ptr<float>(grad_weight, p.K * p.C, "grad_weight");
          args.grad_bias = optional_ptr<float>(grad_bias, p.K, "grad_bias");
          py::gil_scoped_release release;
          MBM_CALL(concat_linear_bwd, args, num_threads);
        });
}

const Binding registered(bind_concat_linear);

}  // namespace
