// A linear layer over the concatenation of inputs that broadcast against each other, on the CPU,
// float32, forward and backward. R rows of y (the product of the broadcast leading dimensions), K
// outputs, C input features in all. Any size may be 0.
//
//   y[m] = bias + sum over inputs i of W_i x_i[row of i that m repeats]
//
// Inputs of equal leading dimensions form a group: they share their rows and how these repeat. A
// group's rows are multiplied once, however often y repeats them. Rows are contiguous; strides
// count elements. Inputs may alias one another; outputs alias nothing. All memory is the caller's
// and is used during the call only.
//
// Results are bitwise the same for any num_threads.
#pragma once

#include <cstdint>
#include <vector>

#include "common/isa.h"

namespace mbm {

struct ConcatLinearInput {
  const float* x;  // [rows of its group, features]
  int64_t stride;  // of its rows
  int64_t features;
  int64_t column;       // where its features begin among the C of the weight
  const float* packed;  // concat_linear_pack_part of its columns; backward with grad_x only
  float* grad_x;        // [rows, features] contiguous, written; null: not needed
};

struct ConcatLinearGroup {
  int64_t rows;
  const int64_t* index;  // [R], the row that each row of y takes; null: rows is R, row m takes m
  std::vector<ConcatLinearInput> inputs;
};

struct ConcatLinearForward {
  int64_t R, K, C;
  std::vector<ConcatLinearGroup> groups;  // of those without an index there is at most one
  const float* packed;                    // concat_linear_pack of weight [K, C]; or
  const float* weight;                    // [K, C] contiguous, for few rows; else null
  const float* bias;                      // [K] or null
  float* y;                               // [R, K] contiguous, written
};

struct ConcatLinearBackward {
  int64_t R, K, C;
  std::vector<ConcatLinearGroup> groups;
  const float* weight;    // [K, C] contiguous, for few rows, instead of packed parts; else null
  const float* grad_y;    // [R, K]
  int64_t grad_y_stride;  // of its rows
  float* grad_weight;     // [K, C] contiguous, written; null: not needed
  float* grad_bias;       // [K], written; null: not needed
};

// Floats of a packed weight [K, C]; of the columns of one part of it, for the gradient of x.
MBM_PER_ISA(int64_t, concat_linear_packed_size, (int64_t K, int64_t C))
MBM_PER_ISA(int64_t, concat_linear_packed_part_size, (int64_t K, int64_t features))
// weight [K, C] contiguous; part: its columns [column, column + features).
MBM_PER_ISA(void, concat_linear_pack,
            (int64_t K, int64_t C, const float* weight, float* packed, int num_threads))
MBM_PER_ISA(void, concat_linear_pack_part,
            (int64_t K, int64_t C, int64_t column, int64_t features, const float* weight,
             float* packed, int num_threads))
// Few rows: tens of them, where packing a weight takes as long as the product. Of a weight that
// lies as it is, whose groups have no index; the gradient of the inputs alone.
MBM_PER_ISA(void, concat_linear_few_fwd, (const ConcatLinearForward& args, int num_threads))
MBM_PER_ISA(void, concat_linear_few_grad_x, (const ConcatLinearBackward& args, int num_threads))
MBM_PER_ISA(void, concat_linear_fwd, (const ConcatLinearForward& args, int num_threads))
MBM_PER_ISA(void, concat_linear_bwd, (const ConcatLinearBackward& args, int num_threads))

}  // namespace mbm
