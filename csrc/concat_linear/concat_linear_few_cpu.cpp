// Few rows: the weight is read once, where it lies, and nothing is packed or kept of it.
#include <algorithm>

#include "common/parallel.h"
#include "common/small_matmul.h"
#include "concat_linear/concat_linear.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kRows = 64;     // at a time
constexpr int64_t kOutputs = 32;  // of a piece of work
constexpr int64_t kSlice = 1024;  // features of one chain of sums: a tile of weights fits L1
constexpr int64_t kFeatures = 16 * kLanes;  // of a piece of the gradient
constexpr int64_t kFewProducts = 64 << 10;  // below, one thread

// y [rows, outputs] += x W^T: rows from m0 on, outputs from n0 on.
void add_product(const ConcatLinearForward& args, const ConcatLinearInput& input, int64_t m0,
                 int64_t rows, int64_t n0, int64_t outputs) {
  float part[kRows * kOutputs];
  const int64_t slices = std::max<int64_t>(1, input.features / kSlice);
  const int64_t step = round_up((input.features + slices - 1) / slices, kLanes);
  for (int64_t e = 0; e < input.features; e += step) {
    const int64_t width = std::min(step, input.features - e);
    matmul_nt(rows, outputs, width, input.x + m0 * input.stride + e, input.stride,
              args.weight + n0 * args.C + input.column + e, args.C, part, outputs);
    for (int64_t m = 0; m < rows; ++m) {
      float* y = args.y + (m0 + m) * args.K + n0;
      for (int64_t n = 0; n < outputs; n += kLanes)
        store_part(y + n,
                   load_part(y + n, outputs - n) + load_part(part + m * outputs + n, outputs - n),
                   outputs - n);
    }
  }
}

}  // namespace

void concat_linear_few_fwd(const ConcatLinearForward& args, int num_threads) {
  const int threads = args.R * args.K * args.C < kFewProducts ? 1 : num_threads;
  parallel_for(threads, args.K, kOutputs, [&](int64_t n0, int64_t n1) {
    for (int64_t m0 = 0; m0 < args.R; m0 += kRows) {
      const int64_t rows = std::min(kRows, args.R - m0);
      for (int64_t m = m0; m < m0 + rows; ++m)
        for (int64_t n = n0; n < n1; n += kLanes)
          store_part(args.y + m * args.K + n, args.bias ? load_part(args.bias + n, n1 - n) : zero(),
                     n1 - n);
      for (const ConcatLinearGroup& group : args.groups)
        for (const ConcatLinearInput& input : group.inputs)
          add_product(args, input, m0, rows, n0, n1 - n0);
    }
  });
}

void concat_linear_few_grad_x(const ConcatLinearBackward& args, int num_threads) {
  const int threads = args.R * args.K * args.C < kFewProducts ? 1 : num_threads;
  for (const ConcatLinearGroup& group : args.groups)
    for (const ConcatLinearInput& input : group.inputs) {
      if (!input.grad_x) continue;
      parallel_for(threads, input.features, kFeatures, [&](int64_t begin, int64_t end) {
        matmul(args.R, args.K, end - begin, args.grad_y, args.grad_y_stride,
               args.weight + input.column + begin, args.C, input.grad_x + begin, input.features);
      });
    }
}

}  // namespace mbm::MBM_ISA
