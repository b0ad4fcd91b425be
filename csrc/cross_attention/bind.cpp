#include "common/bind.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "cross_attention/cross_attention.h"

namespace {

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

const Binding registered(bind_cross_attention);

}  // namespace
