// Few rows: the weight is read once, where it lies, and nothing is packed or kept of it.
#include <algorithm>

#include "common/few_rows.h"
#include "common/parallel.h"
#include "concat_linear/concat_linear.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kFeatures = 16 * kLanes;  // of a piece of the gradient

}  // namespace

void concat_linear_few_fwd(const ConcatLinearForward& args, int num_threads) {
  const int threads = args.R * args.K * args.C < kFewProducts ? 1 : num_threads;
  parallel_for(threads, args.K, kFewOutputs, [&](int64_t n0, int64_t n1) {
    for (int64_t m = 0; m < args.R; m += kFewRows) {
      const int64_t rows = std::min(kFewRows, args.R - m);
      float* y = args.y + m * args.K + n0;
      fill_few_rows(rows, n1 - n0, args.bias ? args.bias + n0 : nullptr, y, args.K);
      for (const ConcatLinearGroup& group : args.groups)
        for (const ConcatLinearInput& in : group.inputs)
          add_few_rows({in.x + m * in.stride, in.stride, in.features,
                        args.weight + n0 * args.C + in.column, args.C, y, args.K},
                       rows, n1 - n0);
    }
  });
}

void concat_linear_few_grad_x(const ConcatLinearBackward& args, int num_threads) {
  const int threads = args.R * args.K * args.C < kFewProducts ? 1 : num_threads;
  for (const ConcatLinearGroup& group : args.groups)
    for (const ConcatLinearInput& in : group.inputs) {
      if (!in.grad_x) continue;
      parallel_for(threads, in.features, kFeatures, [&](int64_t begin, int64_t end) {
        matmul(args.R, args.K, end - begin, args.grad_y, args.grad_y_stride,
               args.weight + in.column + begin, args.C, in.grad_x + begin, in.features);
      });
    }
}

}  // namespace mbm::MBM_ISA
