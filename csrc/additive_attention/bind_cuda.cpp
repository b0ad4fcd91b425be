#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <string_view>
#include <tuple>

#include "additive_attention/additive_attention_cuda.h"
#include "additive_attention/additive_attention_problem.h"
#include "common/gpu/bind.h"
#include "common/problem_fields.h"

namespace {

using mbm::gpu::Place;
using mbm::gpu::pointer;
using mbm::gpu::writable;

// clang-format off
#define MBM_ADDITIVE_ATTENTION_CUDA_PROBLEM(FIELD) MBM_ADDITIVE_ATTENTION_PROBLEM(FIELD) FIELD(dtype)
// clang-format on

struct Problem {
  MBM_PROBLEM_FIELDS("additive_attention_cuda_problem_fields", MBM_ADDITIVE_ATTENTION_CUDA_PROBLEM)

  void check() const {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    for (int64_t size : {B, T, S, D, E}) mbm::check_field("a size", size, 0, kMost);
    for (int64_t stride : {query_t, key_s, value_s})
      mbm::check_field("a row's stride", stride, -kMost, kMost);
    mbm::check_field("dtype", dtype, 0, 2);
  }
};

using Inputs = Addresses<6>;                         // query, key, value, v, key_lengths, mask
using Rows = std::tuple<Address, int64_t, int64_t>;  // address, stride of b, stride of the rows
mbm::AdditiveAttentionCudaInputs inputs_of(const Problem& p, const Inputs& inputs) {
  const auto [query, key, value, v, key_lengths, mask] = inputs;
  mbm::AdditiveAttentionCudaInputs in{};
  in.B = p.B;
  in.T = p.T;
  in.S = p.S;
  in.D = p.D;
  in.E = p.E;
  in.dtype = static_cast<mbm::gpu::Dtype>(p.dtype);
  in.query = pointer(query, p.dtype, p.B * p.T * p.D, "query");
  in.query_b = p.query_b;
  in.query_t = p.query_t;
  in.key = pointer(key, p.dtype, p.B * p.S * p.D, "key");
  in.key_b = p.key_b;
  in.key_s = p.key_s;
  in.value = pointer(value, p.dtype, p.B * p.S * p.E, "value");
  in.value_b = p.value_b;
  in.value_s = p.value_s;
  in.v = pointer(v, p.dtype, p.D, "v");
  in.key_lengths = optional_ptr<const int64_t>(key_lengths, p.B, "key_lengths");
  in.mask = optional_ptr<const uint8_t>(mask, p.B * p.T * p.S, "mask");
  in.mask_b = p.mask_b;
  in.mask_t = p.mask_t;
  in.mask_s = p.mask_s;
  return in;
}

// outputs: context, weights.
void forward(const py::bytes& problem, const Inputs& inputs, const Addresses<2>& outputs,
             const Place& place) {
  const auto p = mbm::read_block<Problem>(std::string_view(problem));
  mbm::AdditiveAttentionCudaForward args{};
  args.in = inputs_of(p, inputs);
  args.context = writable(outputs[0], p.dtype, p.B * p.T * p.E, "context");
  args.weights = writable(outputs[1], p.dtype, p.B * p.T * p.S, "weights");
  mbm::gpu::run(mbm::additive_attention_cuda_fwd, args, place, "additive_attention");
}

void keys(const std::tuple<int64_t, int64_t, int64_t>& sizes, int64_t dtype, const Rows& key,
          const Addresses<2>& made, const Place& place) {
  mbm::check_field("dtype", dtype, 0, 2);
  mbm::AdditiveAttentionCudaKeys args{};
  std::tie(args.B, args.S, args.D) = sizes;
  args.dtype = static_cast<mbm::gpu::Dtype>(dtype);
  Address address = 0;
  std::tie(address, args.key_b, args.key_s) = key;
  args.key = pointer(address, dtype, args.B * args.S * args.D, "key");
  const int64_t count = args.B * args.S;
  const int64_t pitch = mbm::additive_attention_cuda_pitch(args.D);
  args.powers = checked_ptr<float>(made[0], count * pitch, "powers");
  args.magnitudes = checked_ptr<float>(made[1], count, "magnitudes");
  mbm::gpu::run(mbm::additive_attention_cuda_keys, args, place, "additive_attention_keys");
}

// made: powers and magnitudes of the key. outputs: context, weights.
void decode(const py::bytes& problem, const Inputs& inputs, const Addresses<2>& made,
            const Addresses<2>& outputs, const Place& place) {
  const auto p = mbm::read_block<Problem>(std::string_view(problem));
  mbm::AdditiveAttentionCudaDecode args{};
  args.in = inputs_of(p, inputs);
  const int64_t pitch = mbm::additive_attention_cuda_pitch(p.D);
  args.powers = checked_ptr<const float>(made[0], p.B * p.S * pitch, "powers");
  args.magnitudes = checked_ptr<const float>(made[1], p.B * p.S, "magnitudes");
  args.context = writable(outputs[0], p.dtype, p.B * p.T * p.E, "context");
  args.weights = writable(outputs[1], p.dtype, p.B * p.T * p.S, "weights");
  mbm::gpu::run(mbm::additive_attention_cuda_decode, args, place, "additive_attention");
}

// scratch: grad_scores, grad_key_totals. grads: of query, key and, for each batch element, v.
void backward(const py::bytes& problem, const Inputs& inputs, Address weights,
              const Rows& grad_context, const Rows& grad_weights, const Addresses<2>& scratch,
              const Addresses<3>& grads, const Place& place) {
  const auto p = mbm::read_block<Problem>(std::string_view(problem));
  mbm::AdditiveAttentionCudaBackward args{};
  args.in = inputs_of(p, inputs);
  args.weights = pointer(weights, p.dtype, p.B * p.T * p.S, "weights");
  const auto [context, context_b, context_t] = grad_context;
  mbm::check_field("a row's stride", context_t, std::numeric_limits<int32_t>::min(),
                   std::numeric_limits<int32_t>::max());
  if (context != 0) args.grad_context = pointer(context, p.dtype, 1, "grad_context");
  args.grad_context_b = context_b;
  args.grad_context_t = context_t;
  const auto [given, given_b, given_t] = grad_weights;
  if (given != 0) args.grad_weights = pointer(given, p.dtype, 1, "grad_weights");
  args.grad_weights_b = given_b;
  args.grad_weights_t = given_t;
  const int64_t rows = mbm::additive_attention_cuda_rows(p.T);
  args.grad_scores = checked_ptr<float>(scratch[0], p.B * p.S * rows, "grad_scores");
  const int64_t totals =
      rows > mbm::additive_attention_cuda_chunk(p.T) ? p.B * p.S * p.D : int64_t{0};
  args.grad_key_totals = checked_ptr<float>(scratch[1], totals, "grad_key_totals");
  args.grad_query = writable(grads[0], p.dtype, p.B * p.T * p.D, "grad_query");
  args.grad_key = writable(grads[1], p.dtype, p.B * p.S * p.D, "grad_key");
  args.grad_v = checked_ptr<float>(grads[2], p.B * p.D, "grad_v");
  mbm::gpu::run(mbm::additive_attention_cuda_bwd, args, place, "additive_attention");
}

void bind_additive_attention(py::module_& m) {
  bind_problem_fields<Problem>(m);
  m.attr("additive_attention_cuda_most_s") = mbm::kAdditiveAttentionCudaMostS;
  m.def("additive_attention_cuda_rows", &mbm::additive_attention_cuda_rows);
  m.def("additive_attention_cuda_chunk", &mbm::additive_attention_cuda_chunk);
  m.attr("additive_attention_cuda_decode_t") = mbm::kAdditiveAttentionCudaDecodeT;
  m.def("additive_attention_cuda_pitch", &mbm::additive_attention_cuda_pitch);
  m.def("additive_attention_cuda_keys", &keys);
  m.def("additive_attention_cuda_decode", &decode);
  m.def("additive_attention_cuda_fwd", &forward);
  m.def("additive_attention_cuda_bwd", &backward);
}

const Binding registered(bind_additive_attention);

}  // namespace
