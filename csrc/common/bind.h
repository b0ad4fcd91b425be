// What every bind.cpp shares. These are the only CPU files that include pybind11; tensors arrive as
// addresses, which checked_ptr guards.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "common/checked_ptr.h"
#include "common/problem_block.h"

namespace py = pybind11;
using mbm::checked_ptr;
using Address = std::uintptr_t;

// Adds an operation's functions to the module. A bind.cpp defines one of these at namespace scope;
// it is constructed as the library loads, before Python initialises the module:
//   const Binding registered(bind_gru);
class Binding {
 public:
  using Function = void (*)(py::module_&);
  explicit Binding(Function bind) { all().push_back(bind); }
  static std::vector<Function>& all() {
    static std::vector<Function> functions;
    return functions;
  }
};

// A function of no arguments that returns the names of a block's fields, in their order.
template <class T>
void bind_problem_fields(py::module_& m) {
  m.def(T::kFieldsFunction, [] {
    py::tuple names(T::kFields.size());
    for (size_t i = 0; i < T::kFields.size(); ++i) names[i] = T::kFields[i];
    return names;
  });
}

// 0 stands for null.
template <class T>
T* optional_ptr(Address address, int64_t count, const char* name) {
  return address == 0 ? nullptr : checked_ptr<T>(address, count, name);
}
