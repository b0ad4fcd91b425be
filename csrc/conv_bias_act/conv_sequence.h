// Convolutions, what squeeze-and-excitation does between them, and the linear layers of a
// classifier behind them, one after another in one native call: the results between them lie in
// scratch memory that no caller sees.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "conv_bias_act/conv_gate.h"
#include "conv_bias_act/conv_head.h"
#include "conv_bias_act/conv_problem.h"

namespace mbm {

// Where a map lies: at an offset in bytes from one of the addresses that each call is given.
struct ConvPlace {
  int64_t base, offset;  // a negative base: there is none
};

// `problem`: sizes and strides. Addresses have to live as long as the sequence.
struct ConvStep {
  ConvProblem problem;
  uintptr_t packed, weight, bias;
  ConvPlace x, residual, y;
};

struct MeansStep {
  DenseMap map;
  ConvPlace x, y;
};

struct ScaleStep {
  DenseMap map;
  Gate gate;
  ConvPlace x, factors, y;
};

// The weight may lie elsewhere at each call; without a bias its place is none.
struct HeadStep {
  LinearHead head;
  ConvPlace x, weight, bias, y;
};

// A call's addresses, by which places are found.
class ConvBases {
 public:
  explicit ConvBases(const std::vector<uintptr_t>& addresses) : addresses_(addresses) {}

  uintptr_t operator[](const ConvPlace& place) const {
    const uintptr_t base = place.base < 0 ? 0 : addresses_[static_cast<size_t>(place.base)];
    return base == 0 ? 0 : base + static_cast<uintptr_t>(place.offset);
  }
  // What a convolution's kernel takes. Throws std::invalid_argument for a null address.
  ConvForward args(const ConvStep& step) const {
    return forward_args(
        step.problem,
        {(*this)[step.x], step.packed, step.weight, step.bias, (*this)[step.residual]},
        {(*this)[step.y], 0, 0});
  }

 private:
  const std::vector<uintptr_t>& addresses_;
};

class ConvSequence {
 public:
  using Step = std::variant<ConvStep, MeansStep, ScaleStep, HeadStep>;

  explicit ConvSequence(int64_t bases) : bases_(bases) {}

  // Throw std::invalid_argument for a place outside of the addresses, or sizes that there are not.
  void add(const ConvStep& step) {
    check(step.x, true);
    check(step.residual, step.problem.has_residual != 0);
    check(step.y, true);
    steps_.emplace_back(step);
  }
  void add(const MeansStep& step) {
    step.map.check();
    for (const ConvPlace& place : {step.x, step.y}) check(place, true);
    steps_.emplace_back(step);
  }
  void add(const ScaleStep& step) {
    step.map.check();
    for (const ConvPlace& place : {step.x, step.factors, step.y}) check(place, true);
    steps_.emplace_back(step);
  }
  void add(const HeadStep& step) {
    step.head.check();
    for (const ConvPlace& place : {step.x, step.weight, step.y}) check(place, true);
    if (step.bias.base >= 0) check(step.bias, true);
    steps_.emplace_back(step);
  }

  const std::vector<Step>& steps() const { return steps_; }

  // Throws std::invalid_argument for another number of addresses than the constructor was told.
  ConvBases at(const std::vector<uintptr_t>& addresses) const {
    if (static_cast<int64_t>(addresses.size()) != bases_)
      throw std::invalid_argument("sequence: got " + std::to_string(addresses.size()) +
                                  " addresses; expected " + std::to_string(bases_));
    return ConvBases(addresses);
  }

 private:
  void check(const ConvPlace& place, bool needed) const {
    if (needed ? place.base < 0 || place.base >= bases_ || place.offset < 0 : place.base >= 0)
      throw std::invalid_argument("sequence: got a map at base " + std::to_string(place.base) +
                                  "; expected one of " + std::to_string(bases_) +
                                  "; call mbm_kernels.optimize, which places it");
  }

  int64_t bases_;
  std::vector<Step> steps_;
};

}  // namespace mbm
