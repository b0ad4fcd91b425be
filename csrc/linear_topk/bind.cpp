#include "common/bind.h"

#include <tuple>

#include "common/isa.h"
#include "concat_linear/concat_linear.h"
#include "linear_topk/linear_topk.h"

namespace {

void bind_linear_topk(py::module_& m) {
  // The second operand is packed as concat_linear's.
  m.def("linear_topk", [](std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, Address hidden,
                          int64_t hidden_stride, Address packed, Address bias, Address values,
                          Address ids, int num_threads) {
    mbm::LinearTopk args{};
    std::tie(args.R, args.H, args.V, args.k) = sizes;
    const int64_t size = MBM_CALL(concat_linear_packed_size, args.V, args.H);
    args.hidden = checked_ptr<const float>(hidden, args.R * args.H, "hidden");
    args.hidden_stride = hidden_stride;
    args.packed = checked_ptr<const float>(packed, size, "packed");
    args.bias = optional_ptr<const float>(bias, args.V, "bias");
    args.values = checked_ptr<float>(values, args.R * args.k, "values");
    args.ids = checked_ptr<int64_t>(ids, args.R * args.k, "ids");
    py::gil_scoped_release release;
    MBM_CALL(linear_topk, args, num_threads);
  });
}

const Binding registered(bind_linear_topk);

}  // namespace
