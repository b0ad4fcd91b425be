#include "common/bind.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "common/isa.h"
#include "conv_bias_act/conv_sequence.h"

namespace {

using Place = std::pair<int64_t, int64_t>;  // mbm::ConvPlace

// K, C / groups, R, S, groups; address and the steps of outputs, inputs and taps.
using ConvInts = std::vector<int64_t>;
using ConvTaps = std::tuple<Address, int64_t, int64_t, int64_t>;

mbm::ConvWeight conv_weight(const ConvInts& v, const ConvTaps& taps) {
  const auto [address, k_step, c_step, tap_step] = taps;
  const int64_t K = v.at(0), group = v.at(1), R = v.at(2), S = v.at(3), groups = v.at(4);
  const auto* data = optional_ptr<const float>(address, K * group * R * S, "weight");
  return {K, group * groups, R, S, groups, data, k_step, c_step, tap_step};
}

// B, C, pixels of an image, and whether it is channels_last.
using Dense = std::tuple<int64_t, int64_t, int64_t, bool>;

mbm::ConvPlace conv_place(const Place& place) { return {place.first, place.second}; }

mbm::DenseMap dense_map(const Dense& sizes) {
  const auto [batch, channels, pixels, channels_last] = sizes;
  return {batch, channels, pixels, channels_last};
}

void run_means(const mbm::DenseMap& map, Address x, Address means, int num_threads) {
  const auto* from = checked_ptr<const float>(x, map.elements(), "x");
  MBM_CALL(plane_means, map, from, checked_ptr<float>(means, map.planes(), "means"), num_threads);
}

void run_scale(const mbm::DenseMap& map, mbm::Gate gate, Address x, Address factors, Address y,
               int num_threads) {
  const auto* from = checked_ptr<const float>(x, map.elements(), "x");
  const auto* by = checked_ptr<const float>(factors, map.planes(), "factors");
  MBM_CALL(scale_planes, map, from, by, gate, checked_ptr<float>(y, map.elements(), "y"),
           num_threads);
}

// B, C, K and the place of an activation in geometry.py's ACTIVATIONS.
using Head = std::array<int64_t, 4>;

mbm::LinearHead linear_head_of(const Head& sizes) {
  mbm::check_field("activation", sizes[3], 0, static_cast<int64_t>(mbm::Activation::kTanh));
  const mbm::LinearHead head{sizes[0], sizes[1], sizes[2], static_cast<mbm::Activation>(sizes[3])};
  head.check();
  return head;
}

void run_head(const mbm::LinearHead& head, Address x, Address weight, Address bias, Address y,
              int num_threads) {
  const auto* from = checked_ptr<const float>(x, head.B * head.C, "x");
  const auto* by = checked_ptr<const float>(weight, head.K * head.C, "weight");
  const auto* plus = optional_ptr<const float>(bias, head.K, "bias");
  MBM_CALL(linear_head, head, from, by, plus, checked_ptr<float>(y, head.B * head.K, "y"),
           num_threads);
}

mbm::Gate gate_of(bool hardsigmoid) {
  return hardsigmoid ? mbm::Gate::kHardsigmoid : mbm::Gate::kNone;
}

// One step, on the maps of a call.
struct RunStep {
  const mbm::ConvBases& at;
  int num_threads;

  void operator()(const mbm::ConvStep& step) const {
    const mbm::ConvForward args = at.args(step);
    const bool winograd = step.problem.winograd_forward != 0;
    mbm::check_weight(args, MBM_CALL(conv_kernel, args, winograd));
    MBM_CALL(conv_forward, args, winograd, num_threads);
  }
  void operator()(const mbm::MeansStep& step) const {
    run_means(step.map, at[step.x], at[step.y], num_threads);
  }
  void operator()(const mbm::ScaleStep& step) const {
    run_scale(step.map, step.gate, at[step.x], at[step.factors], at[step.y], num_threads);
  }
  void operator()(const mbm::HeadStep& step) const {
    run_head(step.head, at[step.x], at[step.weight], at[step.bias], at[step.y], num_threads);
  }
};

void bind_sequence(py::module_& m) {
  // Steps run one after another. A place is an index into the addresses of a call, -1 for none,
  // and an offset in bytes.
  py::class_<mbm::ConvSequence>(m, "ConvSequence")
      .def(py::init<int64_t>())
      // weight: packed, as it is, bias; places: x, residual, y.
      .def("add",
           [](mbm::ConvSequence& self, const py::bytes& problem, const Addresses<3>& weight,
              const std::array<Place, 3>& places) {
             const auto [packed, plain, bias] = weight;
             self.add(mbm::ConvStep{mbm::read_block<mbm::ConvProblem>(problem), packed, plain, bias,
                                    conv_place(places[0]), conv_place(places[1]),
                                    conv_place(places[2])});
           })
      // places: x, means.
      .def("add_means",
           [](mbm::ConvSequence& self, const Dense& sizes, const std::array<Place, 2>& places) {
             self.add(
                 mbm::MeansStep{dense_map(sizes), conv_place(places[0]), conv_place(places[1])});
           })
      // places: x, factors, y.
      .def("add_scale",
           [](mbm::ConvSequence& self, const Dense& sizes, bool hardsigmoid,
              const std::array<Place, 3>& places) {
             self.add(mbm::ScaleStep{dense_map(sizes), gate_of(hardsigmoid), conv_place(places[0]),
                                     conv_place(places[1]), conv_place(places[2])});
           })
      // places: x, weight, bias, y.
      .def("add_head",
           [](mbm::ConvSequence& self, const Head& sizes, const std::array<Place, 4>& places) {
             self.add(mbm::HeadStep{linear_head_of(sizes), conv_place(places[0]),
                                    conv_place(places[1]), conv_place(places[2]),
                                    conv_place(places[3])});
           })
      .def("run", [](const mbm::ConvSequence& self, const std::vector<Address>& addresses,
                     int num_threads) {
        const mbm::ConvBases at = self.at(addresses);
        py::gil_scoped_release release;
        for (const auto& step : self.steps()) std::visit(RunStep{at, num_threads}, step);
      });
}

// The steps that no operation makes by itself, for tests.
void bind_steps(py::module_& m) {
  m.def("plane_means", [](const Dense& sizes, Address x, Address means, int num_threads) {
    const mbm::DenseMap map = dense_map(sizes);
    map.check();
    run_means(map, x, means, num_threads);
  });
  m.def("scale_planes", [](const Dense& sizes, bool hardsigmoid, Address x, Address factors,
                           Address y, int num_threads) {
    const mbm::DenseMap map = dense_map(sizes);
    map.check();
    run_scale(map, gate_of(hardsigmoid), x, factors, y, num_threads);
  });
  m.def("linear_head",
        [](const Head& sizes, Address x, const Addresses<2>& weights, Address y, int num_threads) {
          const auto [weight, bias] = weights;
          run_head(linear_head_of(sizes), x, weight, bias, y, num_threads);
        });
}

void bind_conv_bias_act(py::module_& m) {
  bind_sequence(m);
  bind_steps(m);
  m.def("conv_packed_size", [](const ConvInts& weight, bool transposed, bool winograd) {
    return MBM_CALL(conv_packed_size, conv_weight(weight, {}), {transposed, winograd, 1, 1, 1, 1});
  });
  // sizes: of the weight, groups, then stride and dilation, rows before columns.
  m.def("conv_pack", [](const ConvInts& sizes, bool transposed, bool winograd, const ConvTaps& taps,
                        Address packed, int num_threads) {
    const mbm::ConvWeight weight = conv_weight(sizes, taps);
    for (size_t i = 5; i < 9; ++i) mbm::ConvProblem::check_step(sizes.at(i), 1);
    const mbm::ConvPacking packing{transposed,  winograd,    sizes.at(5),
                                   sizes.at(6), sizes.at(7), sizes.at(8)};
    checked_ptr<const float>(std::get<0>(taps), weight.K, "weight");
    auto* packed_ptr =
        checked_ptr<float>(packed, MBM_CALL(conv_packed_size, weight, packing), "packed");
    py::gil_scoped_release release;
    MBM_CALL(conv_pack, weight, packing, packed_ptr, num_threads);
  });
  bind_problem_fields<mbm::ConvProblem>(m);
  // The kernel that a problem's forward runs.
  m.def("conv_kernel", [](const py::bytes& problem) {
    const auto p = mbm::read_block<mbm::ConvProblem>(problem);
    constexpr std::array names{"depthwise", "few", "winograd", "pixels", "planes", "direct"};
    const auto kernel = MBM_CALL(conv_kernel, mbm::without_data(p), p.winograd_forward != 0);
    return names.at(static_cast<size_t>(kernel));
  });
  // inputs: x, packed weight, weight, bias, residual; outputs: y, places, z.
  m.def("conv_forward", [](const py::bytes& problem, const Addresses<5>& inputs,
                           const Addresses<3>& outputs, int num_threads) {
    const auto p = mbm::read_block<mbm::ConvProblem>(problem);
    const auto [x, packed, weight, bias, residual] = inputs;
    const auto [y, places, z] = outputs;
    const mbm::ConvForward args =
        mbm::forward_args(p, {x, packed, weight, bias, residual}, {y, places, z});
    mbm::check_weight(args, MBM_CALL(conv_kernel, args, p.winograd_forward != 0));
    py::gil_scoped_release release;
    MBM_CALL(conv_forward, args, p.winograd_forward != 0, num_threads);
  });
  // grad_y: address, strides of B, C, Y, X; inputs: x, packed weight, weight, places, z; grads: of
  // x, weight, bias, residual.
  m.def("conv_backward", [](const py::bytes& problem, const Addresses<5>& grad_y,
                            const Addresses<5>& inputs, const Addresses<4>& grads,
                            int num_threads) {
    const auto p = mbm::read_block<mbm::ConvProblem>(problem);
    const auto [address, b, c, h, w] = grad_y;
    const mbm::ConvMap<const float> map{checked_ptr<const float>(address, p.outputs(), "grad_y"),
                                        static_cast<int64_t>(b), static_cast<int64_t>(c),
                                        static_cast<int64_t>(h), static_cast<int64_t>(w)};
    const auto [x, packed, weight, places, z] = inputs;
    const auto [grad_x, grad_weight, grad_bias, grad_residual] = grads;
    const mbm::ConvBackward args = mbm::backward_args(
        p, map, {x, packed, weight, places, z}, {grad_x, grad_weight, grad_bias, grad_residual});
    const bool winograd = p.winograd_backward != 0;
    py::gil_scoped_release release;
    MBM_CALL(conv_backward, args, winograd, winograd, num_threads);
  });
}

const Binding registered(bind_conv_bias_act);

}  // namespace
