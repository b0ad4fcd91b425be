#include "common/bind.h"

#include <pybind11/stl.h>

#include <array>
#include <string_view>
#include <tuple>

#include "common/isa.h"
#include "cross_attention/cross_attention.h"
#include "cross_attention/cross_attention_problem.h"

namespace {

using Problem = mbm::CrossAttentionProblem;
using Inputs = std::array<Address, 5>;  // query, key, value, key_lengths, mask
// Address, strides of b, n and the rows.
using Heads = std::tuple<Address, int64_t, int64_t, int64_t>;

template <class T>
mbm::HeadRows<T> head_rows(const Heads& heads, int64_t count, const char* name) {
  const auto [address, stride_b, stride_n, stride_r] = heads;
  return {optional_ptr<T>(address, count, name), stride_b, stride_n, stride_r};
}

mbm::CrossAttentionInputs inputs_of(const Problem& p, const Inputs& inputs) {
  const auto [query, key, value, key_lengths, mask] = inputs;
  const int64_t heads = p.B * p.N;
  mbm::CrossAttentionInputs in{};
  in.B = p.B;
  in.N = p.N;
  in.T = p.T;
  in.S = p.S;
  in.D = p.D;
  in.E = p.E;
  in.scale = p.scale();
  in.query = {checked_ptr<const float>(query, heads * p.T * p.D, "query"), p.query_b, p.query_n,
              p.query_t};
  in.key = {checked_ptr<const float>(key, heads * p.S * p.D, "key"), p.key_b, p.key_n, p.key_s};
  in.value = {checked_ptr<const float>(value, heads * p.S * p.E, "value"), p.value_b, p.value_n,
              p.value_s};
  in.key_lengths = optional_ptr<const int64_t>(key_lengths, p.B, "key_lengths");
  const Heads rows{mask, p.mask_b, p.mask_n, p.mask_t};
  if (p.mask_added)
    in.added = head_rows<const float>(rows, heads * p.T * p.S, "mask");
  else
    in.mask = head_rows<const uint8_t>(rows, heads * p.T * p.S, "mask");
  in.mask_stride_s = p.mask_s;
  return in;
}

void bind_cross_attention(py::module_& m) {
  bind_problem_fields<Problem>(m);
  // outputs: context, and the mean and the weights of each head, 0 where they are not wanted.
  m.def("cross_attention_fwd", [](const py::bytes& problem, const Inputs& inputs,
                                  const std::array<Address, 3>& outputs, int num_threads) {
    const auto p = mbm::read_block<Problem>(std::string_view(problem));
    const auto [context, mean, heads] = outputs;
    mbm::CrossAttentionForward args{};
    args.in = inputs_of(p, inputs);
    args.context = {checked_ptr<float>(context, p.B * p.N * p.T * p.E, "context"), p.N * p.T * p.E,
                    p.T * p.E, p.E};
    args.mean = optional_ptr<float>(mean, p.B * p.T * p.S, "mean");
    args.heads = optional_ptr<float>(heads, p.B * p.N * p.T * p.S, "heads");
    py::gil_scoped_release release;
    MBM_CALL(cross_attention_fwd, args, num_threads);
  });
  // heads: the weights of each head, or 0; grads: of query, key, value and an added mask, 0 for
  // those not needed.
  m.def("cross_attention_bwd", [](const py::bytes& problem, const Inputs& inputs, Address heads,
                                  const Heads& grad_context, const Heads& grad_weights,
                                  const std::array<Address, 4>& grads, int num_threads) {
    const auto p = mbm::read_block<Problem>(std::string_view(problem));
    const auto [query, key, value, added] = grads;
    const int64_t count = p.B * p.N, weights = count * p.T * p.S;
    mbm::CrossAttentionBackward args{};
    args.in = inputs_of(p, inputs);
    args.heads = optional_ptr<const float>(heads, weights, "heads");
    args.grad_context = head_rows<const float>(grad_context, count * p.T * p.E, "grad_context");
    args.grad_weights = head_rows<const float>(grad_weights, weights, "grad_weights");
    args.grad_weights_scale = p.grad_weights_scale();
    args.grad_query = {optional_ptr<float>(query, count * p.T * p.D, "grad_query"), p.grad_query_b,
                       p.grad_query_n, p.grad_query_t};
    args.grad_key = {optional_ptr<float>(key, count * p.S * p.D, "grad_key"), p.grad_key_b,
                     p.grad_key_n, p.grad_key_s};
    args.grad_value = {optional_ptr<float>(value, count * p.S * p.E, "grad_value"), p.grad_value_b,
                       p.grad_value_n, p.grad_value_s};
    args.grad_added = optional_ptr<float>(added, weights, "grad_mask");
    py::gil_scoped_release release;
    MBM_CALL(cross_attention_bwd, args, num_threads);
  });
}

const Binding registered(bind_cross_attention);

}  // namespace
