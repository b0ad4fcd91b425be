// With bind_concat_linear.cpp, bind_gru.cpp and bind_losses.cpp the only CPU files that include
// pybind11.
#include "bind_cpu.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "additive_attention/additive_attention.h"
#include "common/fingerprint.h"
#include "common/isa.h"
#include "common/peak.h"
#include "common/scratch_release.h"
#include "common/vector_math.h"
#include "conv_bias_act/conv_problem.h"
#include "cross_attention/cross_attention.h"

namespace {

mbm::Isa parse_isa(const std::string& name) {
  for (mbm::Isa isa :
       {mbm::Isa::kBaseline, mbm::Isa::kAvx2, mbm::Isa::kAvx512, mbm::Isa::kAvx512Lowered})
    if (name == mbm::isa_name(isa)) return isa;
  throw std::invalid_argument("isa: got " + name + "; expected baseline, avx2 or avx512");
}

void bind_common(py::module_& m) {
  m.def("isa", [] { return mbm::isa_name(mbm::active_isa()); });
  m.def("best_isa", [] { return mbm::isa_name(mbm::best_isa()); });
  m.def("runs_isa", [](const std::string& name) { return mbm::runs(parse_isa(name)); });
  m.def("set_isa", [](const std::string& name) { mbm::set_isa(parse_isa(name)); });

  m.def("fingerprint", [](Address data, int64_t bytes, int num_threads) {
    const auto* data_ptr = checked_ptr<const unsigned char>(data, bytes, "data");
    py::gil_scoped_release release;
    return MBM_CALL(fingerprint, data_ptr, bytes, num_threads);
  });
  m.def("release_scratch", [](int num_threads) { MBM_CALL(release_scratch, num_threads); });
  m.def("peak_operations", [] { return MBM_CALL(peak_operations); });
  m.def("peak_run", [](int64_t iterations, int num_threads) {
    py::gil_scoped_release release;
    return MBM_CALL(peak_run, iterations, num_threads);
  });

  py::enum_<mbm::VectorFunction>(m, "VectorFunction")
      .value("erf", mbm::VectorFunction::kErf)
      .value("exp", mbm::VectorFunction::kExp)
      .value("expm1", mbm::VectorFunction::kExpm1)
      .value("log", mbm::VectorFunction::kLog)
      .value("sigmoid", mbm::VectorFunction::kSigmoid)
      .value("slope", mbm::VectorFunction::kSlope)
      .value("softplus", mbm::VectorFunction::kSoftplus)
      .value("tanh", mbm::VectorFunction::kTanh)
      .value("tanh_slope", mbm::VectorFunction::kTanhSlope);
  m.def("vector_math", [](mbm::VectorFunction function, Address x, Address y, int64_t n) {
    const float* x_ptr = checked_ptr<float>(x, n, "x");
    float* y_ptr = checked_ptr<float>(y, n, "y");
    py::gil_scoped_release release;
    MBM_CALL(vector_math, function, x_ptr, y_ptr, n);
  });
}

// Sizes B, T, S, D, E; tensors as (address, stride of b, stride of the rows), the mask with a
// third.
using AttentionSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
using Rows = std::tuple<Address, int64_t, int64_t>;
using Mask = std::tuple<Address, int64_t, int64_t, int64_t>;

mbm::AdditiveAttentionInputs additive_attention_inputs(const AttentionSizes& sizes,
                                                       const Rows& query, const Rows& key,
                                                       const Rows& value, Address v,
                                                       Address key_lengths, const Mask& mask) {
  const auto [B, T, S, D, E] = sizes;
  mbm::AdditiveAttentionInputs in{};
  in.B = B;
  in.T = T;
  in.S = S;
  in.D = D;
  in.E = E;
  in.query = checked_ptr<const float>(std::get<0>(query), B * T * D, "query");
  in.query_stride_b = std::get<1>(query);
  in.query_stride_t = std::get<2>(query);
  in.key = checked_ptr<const float>(std::get<0>(key), B * S * D, "key");
  in.key_stride_b = std::get<1>(key);
  in.key_stride_s = std::get<2>(key);
  in.value = checked_ptr<const float>(std::get<0>(value), B * S * E, "value");
  in.value_stride_b = std::get<1>(value);
  in.value_stride_s = std::get<2>(value);
  in.v = checked_ptr<const float>(v, D, "v");
  in.key_lengths = optional_ptr<const int64_t>(key_lengths, B, "key_lengths");
  in.mask = optional_ptr<const uint8_t>(std::get<0>(mask), B * T * S, "mask");
  in.mask_stride_b = std::get<1>(mask);
  in.mask_stride_t = std::get<2>(mask);
  in.mask_stride_s = std::get<3>(mask);
  return in;
}

void bind_additive_attention(py::module_& m) {
  m.def("additive_attention_packed_key_size", [](int64_t B, int64_t S, int64_t D) {
    return MBM_CALL(additive_attention_packed_key_size, B, S, D);
  });
  m.def("additive_attention_pack_key",
        [](int64_t B, int64_t S, int64_t D, Rows key, Address out, int num_threads) {
          mbm::AdditiveAttentionInputs in{};
          in.B = B;
          in.S = S;
          in.D = D;
          in.key = checked_ptr<const float>(std::get<0>(key), B * S * D, "key");
          in.key_stride_b = std::get<1>(key);
          in.key_stride_s = std::get<2>(key);
          const int64_t size = MBM_CALL(additive_attention_packed_key_size, B, S, D);
          float* out_ptr = checked_ptr<float>(out, size, "out");
          py::gil_scoped_release release;
          MBM_CALL(additive_attention_pack_key, in, out_ptr, num_threads);
        });
  m.def("additive_attention_fwd",
        [](AttentionSizes sizes, Rows query, Rows key, Rows value, Address v, Address key_lengths,
           Mask mask, Address packed_key, Address context, Address weights, int num_threads) {
          mbm::AdditiveAttentionForward args{};
          args.in = additive_attention_inputs(sizes, query, key, value, v, key_lengths, mask);
          const int64_t packed_size =
              MBM_CALL(additive_attention_packed_key_size, args.in.B, args.in.S, args.in.D);
          args.packed_key = optional_ptr<const float>(packed_key, packed_size, "packed_key");
          args.context = checked_ptr<float>(context, args.in.B * args.in.T * args.in.E, "context");
          args.weights = checked_ptr<float>(weights, args.in.B * args.in.T * args.in.S, "weights");
          py::gil_scoped_release release;
          MBM_CALL(additive_attention_fwd, args, num_threads);
        });
  m.def("additive_attention_bwd",
        [](AttentionSizes sizes, Rows query, Rows key, Rows value, Address v, Address key_lengths,
           Mask mask, Address weights, Rows grad_context, Rows grad_weights, Address grad_query,
           Address grad_key, Address grad_value, Address grad_v, int num_threads) {
          mbm::AdditiveAttentionBackward args{};
          args.in = additive_attention_inputs(sizes, query, key, value, v, key_lengths, mask);
          const auto [B, T, S, D, E] = sizes;
          args.weights = checked_ptr<const float>(weights, B * T * S, "weights");
          args.grad_context =
              optional_ptr<const float>(std::get<0>(grad_context), B * T * E, "grad_context");
          args.grad_context_stride_b = std::get<1>(grad_context);
          args.grad_context_stride_t = std::get<2>(grad_context);
          args.grad_weights =
              optional_ptr<const float>(std::get<0>(grad_weights), B * T * S, "grad_weights");
          args.grad_weights_stride_b = std::get<1>(grad_weights);
          args.grad_weights_stride_t = std::get<2>(grad_weights);
          args.grad_query = optional_ptr<float>(grad_query, B * T * D, "grad_query");
          args.grad_key = optional_ptr<float>(grad_key, B * S * D, "grad_key");
          args.grad_value = optional_ptr<float>(grad_value, B * S * E, "grad_value");
          args.grad_v = optional_ptr<float>(grad_v, D, "grad_v");
          py::gil_scoped_release release;
          MBM_CALL(additive_attention_bwd, args, num_threads);
        });
}

// Sizes B, N, T, S, D, E; matrices of heads as (address, strides of b, n and the rows), the mask
// with a fourth stride and whether it is added.
using Heads = std::tuple<Address, int64_t, int64_t, int64_t>;
using HeadMask = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, bool>;

template <class T>
mbm::HeadRows<T> head_rows(const Heads& heads, int64_t count, const char* name) {
  const auto [address, stride_b, stride_n, stride_r] = heads;
  return {optional_ptr<T>(address, count, name), stride_b, stride_n, stride_r};
}

mbm::CrossAttentionInputs cross_attention_inputs(const std::vector<int64_t>& sizes, float scale,
                                                 const Heads& query, const Heads& key,
                                                 const Heads& value, Address key_lengths,
                                                 const HeadMask& mask) {
  if (sizes.size() != 6) throw std::invalid_argument("sizes: expected B, N, T, S, D, E");
  mbm::CrossAttentionInputs in{};
  in.B = sizes[0];
  in.N = sizes[1];
  in.T = sizes[2];
  in.S = sizes[3];
  in.D = sizes[4];
  in.E = sizes[5];
  in.scale = scale;
  const int64_t heads = in.B * in.N;
  checked_ptr<const float>(std::get<0>(query), heads * in.T * in.D, "query");
  checked_ptr<const float>(std::get<0>(key), heads * in.S * in.D, "key");
  checked_ptr<const float>(std::get<0>(value), heads * in.S * in.E, "value");
  in.query = head_rows<const float>(query, heads * in.T * in.D, "query");
  in.key = head_rows<const float>(key, heads * in.S * in.D, "key");
  in.value = head_rows<const float>(value, heads * in.S * in.E, "value");
  in.key_lengths = optional_ptr<const int64_t>(key_lengths, in.B, "key_lengths");
  const auto [address, stride_b, stride_n, stride_t, stride_s, added] = mask;
  const Heads rows{address, stride_b, stride_n, stride_t};
  if (added)
    in.added = head_rows<const float>(rows, heads * in.T * in.S, "mask");
  else
    in.mask = head_rows<const uint8_t>(rows, heads * in.T * in.S, "mask");
  in.mask_stride_s = stride_s;
  return in;
}

void bind_cross_attention(py::module_& m) {
  m.def("cross_attention_fwd", [](const std::vector<int64_t>& sizes, float scale, Heads query,
                                  Heads key, Heads value, Address key_lengths, HeadMask mask,
                                  Heads context, Address mean, Address heads, int num_threads) {
    mbm::CrossAttentionForward args{};
    auto& in = args.in = cross_attention_inputs(sizes, scale, query, key, value, key_lengths, mask);
    const int64_t contexts = in.B * in.N * in.T * in.E;
    checked_ptr<float>(std::get<0>(context), contexts, "context");
    args.context = head_rows<float>(context, contexts, "context");
    args.mean = optional_ptr<float>(mean, in.B * in.T * in.S, "mean");
    args.heads = optional_ptr<float>(heads, in.B * in.N * in.T * in.S, "heads");
    py::gil_scoped_release release;
    MBM_CALL(cross_attention_fwd, args, num_threads);
  });
  m.def("cross_attention_bwd", [](const std::vector<int64_t>& sizes, float scale, Heads query,
                                  Heads key, Heads value, Address key_lengths, HeadMask mask,
                                  Address heads, Heads grad_context, Heads grad_weights,
                                  float grad_weights_scale, Heads grad_query, Heads grad_key,
                                  Heads grad_value, Address grad_added, int num_threads) {
    mbm::CrossAttentionBackward args{};
    auto& in = args.in = cross_attention_inputs(sizes, scale, query, key, value, key_lengths, mask);
    const int64_t count = in.B * in.N, weights = count * in.T * in.S;
    args.heads = optional_ptr<const float>(heads, weights, "heads");
    args.grad_context = head_rows<const float>(grad_context, count * in.T * in.E, "grad_context");
    args.grad_weights = head_rows<const float>(grad_weights, weights, "grad_weights");
    args.grad_weights_scale = grad_weights_scale;
    args.grad_query = head_rows<float>(grad_query, count * in.T * in.D, "grad_query");
    args.grad_key = head_rows<float>(grad_key, count * in.S * in.D, "grad_key");
    args.grad_value = head_rows<float>(grad_value, count * in.S * in.E, "grad_value");
    args.grad_added = optional_ptr<float>(grad_added, weights, "grad_mask");
    py::gil_scoped_release release;
    MBM_CALL(cross_attention_bwd, args, num_threads);
  });
}

// K, C / groups, R, S, groups; address and the steps of outputs, inputs and taps.
using ConvInts = std::vector<int64_t>;
using ConvTaps = std::tuple<Address, int64_t, int64_t, int64_t>;
template <size_t N>
using ConvAddresses = std::array<Address, N>;

mbm::ConvWeight conv_weight(const ConvInts& v, const ConvTaps& taps) {
  const auto [address, k_step, c_step, tap_step] = taps;
  const int64_t K = v.at(0), group = v.at(1), R = v.at(2), S = v.at(3), groups = v.at(4);
  const auto* data = optional_ptr<const float>(address, K * group * R * S, "weight");
  return {K, group * groups, R, S, groups, data, k_step, c_step, tap_step};
}

void bind_conv_bias_act(py::module_& m) {
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
  m.def("conv_problem_fields", [] {
    return std::vector<std::string>(mbm::kConvProblemFields.begin(), mbm::kConvProblemFields.end());
  });
  // inputs: x, packed weight, weight, bias, residual; outputs: y, places, z.
  m.def("conv_forward", [](const py::bytes& problem, const ConvAddresses<5>& inputs,
                           const ConvAddresses<3>& outputs, int num_threads) {
    const mbm::ConvProblem p{std::string_view(problem)};
    const auto [x, packed, weight, bias, residual] = inputs;
    const auto [y, places, z] = outputs;
    const mbm::ConvForward args =
        mbm::forward_args(p, {x, packed, weight, bias, residual}, {y, places, z});
    py::gil_scoped_release release;
    MBM_CALL(conv_forward, args, p.winograd_forward != 0, num_threads);
  });
  // grad_y: address, strides of B, C, Y, X; inputs: x, packed weight, weight, places, z; grads: of
  // x, weight, bias, residual.
  m.def("conv_backward", [](const py::bytes& problem, const ConvAddresses<5>& grad_y,
                            const ConvAddresses<5>& inputs, const ConvAddresses<4>& grads,
                            int num_threads) {
    const mbm::ConvProblem p{std::string_view(problem)};
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

}  // namespace

PYBIND11_MODULE(_C_cpu, m) {
  m.doc() = "CPU kernels of mbm_kernels; call them through mbm_kernels.ops.";
  bind_common(m);
  bind_additive_attention(m);
  bind_concat_linear(m);
  bind_conv_bias_act(m);
  bind_cross_attention(m);
  bind_gru(m);
  bind_losses(m);
}
