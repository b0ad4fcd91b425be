// What is the same in every call of a GRU's step: one block, filled once (problem.py). Only the
// binding reads it.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "common/checked_ptr.h"
#include "common/problem_block.h"
#include "gru_cell/gru_cell.h"

namespace mbm {

// Sizes, and the stride of x between rows, in elements.
#define MBM_GRU_CELL_PROBLEM(FIELD) FIELD(B) FIELD(C) FIELD(H) FIELD(x_b)

struct GruCellProblem {
  MBM_PROBLEM_FIELDS("gru_cell_problem_fields", MBM_GRU_CELL_PROBLEM)

  void check() const {
    for (int64_t size : {B, C, H})
      if (size < 0) throw std::invalid_argument("problem: got a negative size");
  }
};

struct GruCellAddresses {
  uintptr_t x, h, w_ih, w_hh;
};

inline GruCellInputs gru_cell_inputs(const GruCellProblem& p, const GruCellAddresses& at) {
  return {p.B,
          p.C,
          p.H,
          checked_ptr<const float>(at.x, p.B * p.C, "x"),
          p.x_b,
          checked_ptr<const float>(at.h, p.B * p.H, "h"),
          checked_ptr<const float>(at.w_ih, 3 * p.H * p.C, "w_ih"),
          checked_ptr<const float>(at.w_hh, 3 * p.H * p.H, "w_hh")};
}

}  // namespace mbm
