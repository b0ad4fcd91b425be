#include "common/bind.h"

#include <stdexcept>
#include <string>

#include "common/contention.h"
#include "common/fingerprint.h"
#include "common/isa.h"
#include "common/peak.h"
#include "common/scratch_release.h"
#include "common/vector_math.h"

namespace {

mbm::Isa parse_isa(const std::string& name) {
  for (mbm::Isa isa :
       {mbm::Isa::kBaseline, mbm::Isa::kAvx2, mbm::Isa::kAvx512, mbm::Isa::kAvx512Lowered})
    if (name == mbm::isa_name(isa)) return isa;
  throw std::invalid_argument("isa: got " + name + "; expected baseline, avx2 or avx512");
}

void bind_common(py::module_& m) {
  m.def("isa", [] { return mbm::isa_name(mbm::active_isa()); });
  m.def("best_isa", [] { return mbm::isa_name(mbm::best_isa()); });
  m.def("runs_isa", [](const std::string& name) { return mbm::runs(parse_isa(name)); });
  m.def("set_isa", [](const std::string& name) { mbm::set_isa(parse_isa(name)); });

  m.def("fingerprint", [](Address data, int64_t bytes, int num_threads) {
    const auto* data_ptr = checked_ptr<const unsigned char>(data, bytes, "data");
    py::gil_scoped_release release;
    return MBM_CALL(fingerprint, data_ptr, bytes, num_threads);
  });
  m.def("granted_team", mbm::granted_team);  // this and the next for tests
  m.def("note_team", mbm::note_team);
  m.def("release_scratch", [](int num_threads) { MBM_CALL(release_scratch, num_threads); });
  m.def("peak_operations", [] { return MBM_CALL(peak_operations); });
  m.def("peak_run", [](int64_t iterations, int num_threads) {
    py::gil_scoped_release release;
    return MBM_CALL(peak_run, iterations, num_threads);
  });

  py::enum_<mbm::VectorFunction>(m, "VectorFunction")
      .value("erf", mbm::VectorFunction::kErf)
      .value("exp", mbm::VectorFunction::kExp)
      .value("expm1", mbm::VectorFunction::kExpm1)
      .value("log", mbm::VectorFunction::kLog)
      .value("sigmoid", mbm::VectorFunction::kSigmoid)
      .value("slope", mbm::VectorFunction::kSlope)
      .value("softplus", mbm::VectorFunction::kSoftplus)
      .value("tanh", mbm::VectorFunction::kTanh)
      .value("tanh_slope", mbm::VectorFunction::kTanhSlope);
  m.def("vector_math", [](mbm::VectorFunction function, Address x, Address y, int64_t n) {
    const float* x_ptr = checked_ptr<float>(x, n, "x");
    float* y_ptr = checked_ptr<float>(y, n, "y");
    py::gil_scoped_release release;
    MBM_CALL(vector_math, function, x_ptr, y_ptr, n);
  });
}

const Binding registered(bind_common);

}  // namespace

PYBIND11_MODULE(_C_cpu, m) {
  m.doc() = "CPU kernels of mbm_kernels; call them through mbm_kernels.ops.";
  for (const Binding::Function bind : Binding::all()) bind(m);
}
