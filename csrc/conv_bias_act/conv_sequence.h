// Convolutions that run one after another in one native call: the results between them lie in
// scratch memory that no caller sees.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "conv_bias_act/conv_problem.h"

namespace mbm {

// Where a map lies: at an offset in bytes from one of the addresses that each call is given.
struct ConvPlace {
  int64_t base, offset;  // a negative base: there is none
};

struct ConvStep {
  ConvProblem problem;
  uintptr_t packed, weight, bias;  // addresses; they have to live as long as the sequence
  ConvPlace x, residual, y;
};

class ConvSequence {
 public:
  explicit ConvSequence(int64_t bases) : bases_(bases) {}

  // Throws std::invalid_argument for a place outside of the addresses.
  void add(const ConvStep& step) {
    for (const auto& [place, needed] :
         {std::pair{step.x, true}, {step.residual, step.problem.has_residual != 0}, {step.y, true}})
      if (needed ? place.base < 0 || place.base >= bases_ || place.offset < 0 : place.base >= 0)
        throw std::invalid_argument("sequence: got a map at base " + std::to_string(place.base) +
                                    "; expected one of " + std::to_string(bases_) +
                                    "; call mbm_kernels.optimize, which places it");
    steps_.push_back(step);
  }

  size_t size() const { return steps_.size(); }

  // The arguments of step i. Throws std::invalid_argument for another number of addresses than the
  // constructor was told, or a null address that is read or written.
  ConvForward args(size_t i, const std::vector<uintptr_t>& bases) const {
    if (static_cast<int64_t>(bases.size()) != bases_)
      throw std::invalid_argument("sequence: got " + std::to_string(bases.size()) +
                                  " addresses; expected " + std::to_string(bases_));
    const ConvStep& step = steps_[i];
    const auto at = [&bases](const ConvPlace& place) {
      const uintptr_t base = place.base < 0 ? 0 : bases[static_cast<size_t>(place.base)];
      return base == 0 ? 0 : base + static_cast<uintptr_t>(place.offset);
    };
    return forward_args(step.problem,
                        {at(step.x), step.packed, step.weight, step.bias, at(step.residual)},
                        {at(step.y), 0, 0});
  }

  bool winograd(size_t i) const { return steps_[i].problem.winograd_forward != 0; }

 private:
  int64_t bases_;
  std::vector<ConvStep> steps_;
};

}  // namespace mbm
