// What the files that bind CPU kernels share. Tensors arrive as addresses; checked_ptr guards them.
#pragma once

#include <pybind11/pybind11.h>

#include "common/checked_ptr.h"

namespace py = pybind11;
using mbm::checked_ptr;
using Address = std::uintptr_t;

// 0 stands for null.
template <class T>
T* optional_ptr(Address address, int64_t count, const char* name) {
  return address == 0 ? nullptr : checked_ptr<T>(address, count, name);
}

void bind_concat_linear(py::module_& m);
void bind_gru(py::module_& m);
void bind_losses(py::module_& m);
