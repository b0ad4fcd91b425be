#include "common/bind.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "conv_bias_act/conv_bias_act.h"

namespace {

// Sizes in the order of ConvSizes; maps as (address, strides of B, C, Y, X).
using ConvInts = std::vector<int64_t>;
using ConvStrides = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;

// Kernels multiply these by counts of pixels.
void check_steps(const ConvInts& v, size_t from, size_t to, int64_t least) {
  constexpr int64_t most = int64_t{1} << 32;
  for (size_t i = from; i < to; ++i)
    if (v.at(i) < least || v.at(i) > most)
      throw std::invalid_argument("sizes: got a stride, dilation, padding or window of " +
                                  std::to_string(v[i]) + "; expected " + std::to_string(least) +
                                  " to 2^32; call mbm_kernels.conv_bias_act, which checks it");
}

mbm::ConvSizes conv_sizes(const ConvInts& v) {
  if (v.size() != 25) throw std::invalid_argument("sizes: expected 25 numbers");
  check_steps(v, 7, 9, 1);
  check_steps(v, 9, 11, 0);
  check_steps(v, 11, 13, 1);
  check_steps(v, 18, 22, 1);
  check_steps(v, 22, 24, 0);
  return {v[0],  v[1],  v[2],  v[3],  v[4],
          v[5],  v[6],  v[7],  v[8],  v[9],
          v[10], v[11], v[12], v[13], v[14],
          v[15], v[16], v[17], v[18], v[19],
          v[20], v[21], v[22], v[23], static_cast<mbm::Activation>(v[24])};
}

template <class T>
mbm::ConvMap<T> conv_map(const ConvStrides& map, int64_t count, const char* name) {
  const auto [address, b, c, y, x] = map;
  return {optional_ptr<T>(address, count, name), b, c, y, x};
}

// K, C / groups, R, S, groups; address and the steps of outputs, inputs and taps.
using ConvTaps = std::tuple<Address, int64_t, int64_t, int64_t>;

mbm::ConvWeight conv_weight(int64_t K, int64_t C, int64_t R, int64_t S, int64_t groups,
                            const ConvTaps& taps) {
  const auto [address, k_step, c_step, tap_step] = taps;
  const auto* data = optional_ptr<const float>(address, K * C / groups * R * S, "weight");
  return {K, C, R, S, groups, data, k_step, c_step, tap_step};
}

mbm::ConvWeight conv_weight(const ConvInts& v, const ConvTaps& taps) {
  return conv_weight(v.at(0), v.at(1) * v.at(4), v.at(2), v.at(3), v.at(4), taps);
}

void bind_conv_bias_act(py::module_& m) {
  m.def("conv_packed_size", [](const ConvInts& weight, bool transposed, bool winograd) {
    return MBM_CALL(conv_packed_size, conv_weight(weight, {}), {transposed, winograd, 1, 1, 1, 1});
  });
  // sizes: of the weight, groups, then stride and dilation, rows before columns.
  m.def("conv_pack", [](const ConvInts& sizes, bool transposed, bool winograd, const ConvTaps& taps,
                        Address packed, int num_threads) {
    const mbm::ConvWeight weight = conv_weight(sizes, taps);
    check_steps(sizes, 5, 9, 1);
    const mbm::ConvPacking packing{transposed,  winograd,    sizes.at(5),
                                   sizes.at(6), sizes.at(7), sizes.at(8)};
    checked_ptr<const float>(std::get<0>(taps), weight.K, "weight");
    auto* packed_ptr =
        checked_ptr<float>(packed, MBM_CALL(conv_packed_size, weight, packing), "packed");
    py::gil_scoped_release release;
    MBM_CALL(conv_pack, weight, packing, packed_ptr, num_threads);
  });
  m.def("conv_forward", [](const ConvInts& sizes, ConvStrides x, Address packed, ConvTaps weight,
                           Address bias, ConvStrides residual, ConvStrides y, Address places,
                           Address z, bool winograd, int num_threads) {
    mbm::ConvForward args{};
    const mbm::ConvSizes& s = args.sizes = conv_sizes(sizes);
    const int64_t in = s.B * s.C * s.Y * s.X, out = s.B * s.K * s.out_y * s.out_x;
    checked_ptr<const float>(std::get<0>(x), in, "x");
    checked_ptr<const float>(std::get<0>(y), out, "y");
    args.x = conv_map<const float>(x, in, "x");
    args.packed = optional_ptr<const float>(packed, 1, "packed");
    args.weight = conv_weight(s.K, s.C, s.R, s.S, s.groups, weight);
    checked_ptr<const float>(packed ? packed : std::get<0>(weight), 1, "weight");
    args.bias = optional_ptr<const float>(bias, s.K, "bias");
    args.residual = conv_map<const float>(residual, s.B * s.K * s.conv_y * s.conv_x, "residual");
    args.y = conv_map<float>(y, out, "y");
    args.places = optional_ptr<uint8_t>(places, out, "places");
    args.z = optional_ptr<float>(z, out, "z");
    py::gil_scoped_release release;
    MBM_CALL(conv_forward, args, winograd, num_threads);
  });
  m.def("conv_backward",
        [](const ConvInts& sizes, ConvStrides grad_y, ConvStrides x, Address packed,
           ConvTaps weight, Address places, Address z, ConvStrides grad_x,
           ConvStrides grad_residual, Address grad_weight, Address grad_bias, bool winograd_x,
           bool winograd_weight, int num_threads) {
          mbm::ConvBackward args{};
          const mbm::ConvSizes& s = args.sizes = conv_sizes(sizes);
          const int64_t in = s.B * s.C * s.Y * s.X, out = s.B * s.K * s.out_y * s.out_x;
          checked_ptr<const float>(std::get<0>(grad_y), out, "grad_y");
          args.grad_y = conv_map<const float>(grad_y, out, "grad_y");
          checked_ptr<const float>(std::get<0>(x), grad_weight ? in : 0, "x");
          args.x = conv_map<const float>(x, in, "x");
          args.grad_x = conv_map<float>(grad_x, in, "grad_x");
          args.packed = optional_ptr<const float>(packed, 1, "packed");
          args.weight = conv_weight(s.K, s.C, s.R, s.S, s.groups, weight);
          checked_ptr<const float>(packed ? packed : std::get<0>(weight), args.grad_x.data ? 1 : 0,
                                   "weight");
          args.places = optional_ptr<const uint8_t>(places, out, "places");
          args.z = optional_ptr<const float>(z, out, "z");
          args.grad_residual =
              conv_map<float>(grad_residual, s.B * s.K * s.conv_y * s.conv_x, "grad_residual");
          args.grad_weight =
              optional_ptr<float>(grad_weight, s.K * s.C / s.groups * s.R * s.S, "grad_weight");
          args.grad_bias = optional_ptr<float>(grad_bias, s.K, "grad_bias");
          py::gil_scoped_release release;
          MBM_CALL(conv_backward, args, winograd_x, winograd_weight, num_threads);
        });
}

const Binding registered(bind_conv_bias_act);

}  // namespace
