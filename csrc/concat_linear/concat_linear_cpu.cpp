// Each group's product once; those that repeat first, since the product of the group with all rows
// starts from their sum instead of from 0, block by block of y while it is in L2.
#include <algorithm>

#include "common/gemm.h"
#include "concat_linear/concat_linear.h"

namespace mbm::MBM_ISA {
namespace {

int64_t features_of(const ConcatLinearGroup& group) {
  int64_t features = 0;
  for (const ConcatLinearInput& input : group.inputs) features += input.features;
  return features;
}

// c [M, K] = what fill(m, n0, n1, row) puts into columns [n0, n1) of each row, plus the products.
template <class Fill>
void product(const ConcatLinearForward& args, const std::vector<ConcatLinearInput>& inputs,
             int64_t M, int64_t features, float* c, int num_threads, const Fill& fill) {
  for_gemm_blocks(num_threads, M, args.K, features,
                  [&](int64_t m0, int64_t m1, int64_t p0, int64_t p1, float* packed_a) {
                    const int64_t n0 = p0 * kPanel, n1 = std::min(args.K, p1 * kPanel);
                    for (int64_t m = m0; m < m1; ++m) fill(m, n0, n1, c + m * args.K);
                    for (const ConcatLinearInput& input : inputs) {
                      if (input.features == 0) continue;
                      const GemmOperands g{M,
                                           args.K,
                                           input.features,
                                           {input.x, input.stride},
                                           false,
                                           args.packed + input.column * kPanel,
                                           args.C * kPanel,
                                           c,
                                           args.K,
                                           nullptr,
                                           true};
                      gemm_block(g, m0, m1, p0, p1, packed_a);
                    }
                  });
}

// sums[index[m]] += rows of g for columns [n0, n1), n1 - n0 <= kColumns; without an index all rows
// go to the only sum. Runs of one index are added in registers, in chains of kChain rows.
constexpr int kColumns = 4 * kLanes;

void add_rows(const float* g, int64_t stride, int64_t R, const int64_t* index, int64_t n0,
              int64_t n1, float* sums, int64_t sums_stride) {
  for (int64_t m = 0; m < R;) {
    const int64_t target = index ? index[m] : 0;
    const int64_t limit = std::min(R, m + kChain);
    vf chain[4] = {};
    for (; m < limit && (!index || index[m] == target); ++m)
      for (int64_t n = n0; n < n1; n += kLanes)
        chain[(n - n0) / kLanes] += load_part(g + m * stride + n, n1 - n);
    float* out = sums + target * sums_stride;
    for (int64_t n = n0; n < n1; n += kLanes)
      store_part(out + n, load_part(out + n, n1 - n) + chain[(n - n0) / kLanes], n1 - n);
  }
}

void sum_rows_of(const float* g, int64_t stride, int64_t R, int64_t K, const int64_t* index,
                 int64_t rows, float* sums, int num_threads) {
  std::fill_n(sums, rows * K, 0.0f);
  const int threads = R * K < 65536 ? 1 : num_threads;
  parallel_for(threads, K, kColumns,
               [&](int64_t n0, int64_t n1) { add_rows(g, stride, R, index, n0, n1, sums, K); });
}

constexpr int64_t kPackedRows = 2048;  // of x at once for grad_weight: whole chains of the GEMM

// Columns [column, column + features) of grad_weight: g^T x.
void weight_gradient(const ConcatLinearBackward& args, const ConcatLinearInput& input,
                     const float* g, int64_t stride, int64_t rows, int num_threads) {
  const int64_t most = std::min(rows, kPackedRows);
  const Scratch packed(sizeof(float) *
                       static_cast<size_t>(panels_of(input.features) * kPanel * most));
  int64_t r = 0;
  do {
    const int64_t now = std::min(kPackedRows, rows - r);
    pack_b(num_threads, {input.x + r * input.stride, input.stride}, false, input.features, now,
           packed.as<float>());
    gemm(num_threads, {args.K,
                       input.features,
                       now,
                       {g + r * stride, stride},
                       true,
                       packed.as<float>(),
                       now * kPanel,
                       args.grad_weight + input.column,
                       args.C,
                       nullptr,
                       r > 0});
    r += now;
  } while (r < rows);
}

}  // namespace

int64_t concat_linear_packed_size(int64_t K, int64_t C) { return panels_of(K) * kPanel * C; }
int64_t concat_linear_packed_part_size(int64_t K, int64_t features) {
  return panels_of(features) * kPanel * K;
}
void concat_linear_pack(int64_t K, int64_t C, const float* weight, float* packed, int num_threads) {
  pack_b(num_threads, {weight, C}, true, K, C, packed);
}
void concat_linear_pack_part(int64_t K, int64_t C, int64_t column, int64_t features,
                             const float* weight, float* packed, int num_threads) {
  pack_b(num_threads, {weight + column, C}, false, features, K, packed);
}

void concat_linear_fwd(const ConcatLinearForward& args, int num_threads) {
  if (args.weight) return concat_linear_few_fwd(args, num_threads);
  struct Repeated {
    const float* product;  // [rows, K]
    const int64_t* index;
  };
  int64_t repeated_rows = 0;
  for (const ConcatLinearGroup& group : args.groups)
    if (group.index) repeated_rows += group.rows;
  const Scratch memory(sizeof(float) * static_cast<size_t>(repeated_rows * args.K));
  std::vector<Repeated> repeated;
  const ConcatLinearGroup* whole = nullptr;
  float* next = memory.as<float>();
  for (const ConcatLinearGroup& group : args.groups) {
    if (!group.index) {
      whole = &group;
      continue;
    }
    product(
        args, group.inputs, group.rows, features_of(group), next, num_threads,
        [](int64_t, int64_t n0, int64_t n1, float* row) { std::fill(row + n0, row + n1, 0.0f); });
    repeated.push_back({next, group.index});
    next += group.rows * args.K;
  }
  static const std::vector<ConcatLinearInput> none;
  product(args, whole ? whole->inputs : none, args.R, whole ? features_of(*whole) : 1, args.y,
          num_threads, [&](int64_t m, int64_t n0, int64_t n1, float* row) {
            for (int64_t n = n0; n < n1; n += kLanes) {
              vf sum = args.bias ? load_part(args.bias + n, n1 - n) : zero();
              for (const Repeated& r : repeated)
                sum += load_part(r.product + r.index[m] * args.K + n, n1 - n);
              store_part(row + n, sum, n1 - n);
            }
          });
}

void concat_linear_bwd(const ConcatLinearBackward& args, int num_threads) {
  const float* fewest = args.grad_y;  // rows whose sum is the gradient of the bias
  int64_t fewest_rows = args.R, fewest_stride = args.grad_y_stride, repeated_rows = 0;
  for (const ConcatLinearGroup& group : args.groups)
    if (group.index) repeated_rows += group.rows;
  const Scratch memory(sizeof(float) * static_cast<size_t>(repeated_rows * args.K));
  float* next = memory.as<float>();
  for (const ConcatLinearGroup& group : args.groups) {
    const float* g = args.grad_y;
    int64_t stride = args.grad_y_stride;
    if (group.index) {
      sum_rows_of(args.grad_y, stride, args.R, args.K, group.index, group.rows, next, num_threads);
      g = next;
      stride = args.K;
      next += group.rows * args.K;
      if (group.rows < fewest_rows) {
        fewest = g;
        fewest_rows = group.rows;
        fewest_stride = stride;
      }
    }
    for (const ConcatLinearInput& input : group.inputs) {
      if (input.grad_x && !args.weight)
        gemm(num_threads, {group.rows,
                           input.features,
                           args.K,
                           {g, stride},
                           false,
                           input.packed,
                           args.K * kPanel,
                           input.grad_x,
                           input.features,
                           nullptr,
                           false});
      if (args.grad_weight) weight_gradient(args, input, g, stride, group.rows, num_threads);
    }
  }
  if (args.weight) concat_linear_few_grad_x(args, num_threads);
  if (args.grad_bias)
    sum_rows_of(fewest, fewest_stride, fewest_rows, args.K, nullptr, 1, args.grad_bias,
                num_threads);
}

}  // namespace mbm::MBM_ISA
