#include "common/bind.h"

#include <pybind11/stl.h>

#include <array>
#include <string_view>
#include <tuple>

#include "additive_attention/additive_attention.h"
#include "additive_attention/additive_attention_problem.h"
#include "common/isa.h"

namespace {

using Problem = mbm::AdditiveAttentionProblem;
using Inputs = std::array<Address, 6>;  // query, key, value, v, key_lengths, mask
// Address, stride of b, stride of the rows.
using Rows = std::tuple<Address, int64_t, int64_t>;

mbm::AdditiveAttentionInputs inputs_of(const Problem& p, const Inputs& inputs) {
  const auto [query, key, value, v, key_lengths, mask] = inputs;
  mbm::AdditiveAttentionInputs in{};
  in.B = p.B;
  in.T = p.T;
  in.S = p.S;
  in.D = p.D;
  in.E = p.E;
  in.query = checked_ptr<const float>(query, p.B * p.T * p.D, "query");
  in.query_stride_b = p.query_b;
  in.query_stride_t = p.query_t;
  in.key = checked_ptr<const float>(key, p.B * p.S * p.D, "key");
  in.key_stride_b = p.key_b;
  in.key_stride_s = p.key_s;
  in.value = checked_ptr<const float>(value, p.B * p.S * p.E, "value");
  in.value_stride_b = p.value_b;
  in.value_stride_s = p.value_s;
  in.v = checked_ptr<const float>(v, p.D, "v");
  in.key_lengths = optional_ptr<const int64_t>(key_lengths, p.B, "key_lengths");
  in.mask = optional_ptr<const uint8_t>(mask, p.B * p.T * p.S, "mask");
  in.mask_stride_b = p.mask_b;
  in.mask_stride_t = p.mask_t;
  in.mask_stride_s = p.mask_s;
  return in;
}

void bind_additive_attention(py::module_& m) {
  bind_problem_fields<Problem>(m);
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
  // packed_key: of additive_attention_pack_key, or 0; outputs: context, weights.
  m.def("additive_attention_fwd",
        [](const py::bytes& problem, const Inputs& inputs, Address packed_key,
           const std::array<Address, 2>& outputs, int num_threads) {
          const auto p = mbm::read_block<Problem>(std::string_view(problem));
          mbm::AdditiveAttentionForward args{};
          args.in = inputs_of(p, inputs);
          const int64_t packed_size = MBM_CALL(additive_attention_packed_key_size, p.B, p.S, p.D);
          args.packed_key = optional_ptr<const float>(packed_key, packed_size, "packed_key");
          args.context = checked_ptr<float>(outputs[0], p.B * p.T * p.E, "context");
          args.weights = checked_ptr<float>(outputs[1], p.B * p.T * p.S, "weights");
          py::gil_scoped_release release;
          MBM_CALL(additive_attention_fwd, args, num_threads);
        });
  // grads: of query, key, value, v; 0 for those not needed.
  m.def(
      "additive_attention_bwd",
      [](const py::bytes& problem, const Inputs& inputs, Address weights, const Rows& grad_context,
         const Rows& grad_weights, const std::array<Address, 4>& grads, int num_threads) {
        const auto p = mbm::read_block<Problem>(std::string_view(problem));
        mbm::AdditiveAttentionBackward args{};
        args.in = inputs_of(p, inputs);
        args.weights = checked_ptr<const float>(weights, p.B * p.T * p.S, "weights");
        const auto [context, context_b, context_t] = grad_context;
        args.grad_context = optional_ptr<const float>(context, p.B * p.T * p.E, "grad_context");
        args.grad_context_stride_b = context_b;
        args.grad_context_stride_t = context_t;
        const auto [given, given_b, given_t] = grad_weights;
        args.grad_weights = optional_ptr<const float>(given, p.B * p.T * p.S, "grad_weights");
        args.grad_weights_stride_b = given_b;
        args.grad_weights_stride_t = given_t;
        args.grad_query = optional_ptr<float>(grads[0], p.B * p.T * p.D, "grad_query");
        args.grad_key = optional_ptr<float>(grads[1], p.B * p.S * p.D, "grad_key");
        args.grad_value = optional_ptr<float>(grads[2], p.B * p.S * p.E, "grad_value");
        args.grad_v = optional_ptr<float>(grads[3], p.D, "grad_v");
        py::gil_scoped_release release;
        MBM_CALL(additive_attention_bwd, args, num_threads);
      });
}

const Binding registered(bind_additive_attention);

}  // namespace
