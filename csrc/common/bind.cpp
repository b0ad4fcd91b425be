#include "common/bind.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "common/contention.h"
#include "common/fingerprint.h"
#include "common/index_range.h"
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

// The hash of each of several arrays, as native 64-bit words, and a byte that names the ISA in use.
// extents: the bytes of each as int64; addresses: as many.
py::bytes fingerprints(const py::bytes& extents, const py::list& addresses, int num_threads) {
  const std::string_view bytes = extents;
  const size_t count = addresses.size();
  if (bytes.size() != count * sizeof(int64_t))
    throw std::invalid_argument("extents: got " + std::to_string(bytes.size()) +
                                " bytes; expected 8 for each address");
  std::vector<int64_t> sizes(count);
  std::vector<const unsigned char*> data(count);
  if (count > 0) std::memcpy(sizes.data(), bytes.data(), bytes.size());
  for (size_t i = 0; i < count; ++i)
    data[i] = checked_ptr<const unsigned char>(py::cast<Address>(addresses[i]), sizes[i], "data");
  std::string found(count * sizeof(uint64_t) + 1, static_cast<char>(mbm::active_isa()));
  {
    py::gil_scoped_release release;
    for (size_t i = 0; i < count; ++i) {
      const uint64_t hash = MBM_CALL(fingerprint, data[i], sizes[i], num_threads);
      std::memcpy(&found[i * sizeof(hash)], &hash, sizeof(hash));
    }
  }
  return py::bytes(found);
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
  m.def("fingerprints", fingerprints);
  m.def("index_range", [](Address index, int64_t n, int64_t ignored) {
    const mbm::IndexRange range =
        mbm::index_range(checked_ptr<const int64_t>(index, n, "index"), n, ignored);
    return py::make_tuple(range.low, range.high, range.ignored);
  });
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
