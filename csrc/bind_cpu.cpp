// The only CPU file that includes pybind11. Tensors arrive as addresses; checked_ptr guards them.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/checked_ptr.h"
#include "common/isa.h"
#include "common/vector_math.h"

namespace py = pybind11;
using mbm::checked_ptr;
using Address = std::uintptr_t;

namespace {

mbm::Isa parse_isa(const std::string& name) {
  for (mbm::Isa isa : {mbm::Isa::kBaseline, mbm::Isa::kAvx2, mbm::Isa::kAvx512})
    if (name == mbm::isa_name(isa)) return isa;
  throw std::invalid_argument("isa: got " + name + "; expected baseline, avx2 or avx512");
}

void bind_common(py::module_& m) {
  m.def("isa", [] { return mbm::isa_name(mbm::active_isa()); });
  m.def("best_isa", [] { return mbm::isa_name(mbm::best_isa()); });
  m.def("set_isa", [](const std::string& name) { mbm::set_isa(parse_isa(name)); });

  py::enum_<mbm::VectorFunction>(m, "VectorFunction")
      .value("exp", mbm::VectorFunction::kExp)
      .value("expm1", mbm::VectorFunction::kExpm1)
      .value("sigmoid", mbm::VectorFunction::kSigmoid)
      .value("tanh", mbm::VectorFunction::kTanh);
  m.def("vector_math", [](mbm::VectorFunction function, Address x, Address y, int64_t n) {
    const float* x_ptr = checked_ptr<float>(x, n, "x");
    float* y_ptr = checked_ptr<float>(y, n, "y");
    py::gil_scoped_release release;
    MBM_CALL(vector_math, function, x_ptr, y_ptr, n);
  });
}

}  // namespace

PYBIND11_MODULE(_C_cpu, m) {
  m.doc() = "CPU kernels of mbm_kernels; call them through mbm_kernels.ops.";
  bind_common(m);
}
