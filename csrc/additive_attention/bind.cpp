#include "common/bind.h"

#include <tuple>

#include "additive_attention/additive_attention.h"
#include "common/isa.h"

namespace {

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

const Binding registered(bind_additive_attention);

}  // namespace
