// The only CUDA-side file that includes pybind11; the CUDA runtime is linked statically, so the
// module imports on a machine without a driver.
#include <pybind11/pybind11.h>

#include "common/probe.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of mbm_kernels; call them through mbm_kernels.ops.";
  m.def(
      "why_not",
      []() -> py::object {
        const char* reason = nullptr;
        {
          py::gil_scoped_release release;
          reason = mbm::cuda_probe();
        }
        if (reason == nullptr) return py::none();
        return py::str(reason);
      },
      "None when a kernel of this build ran on the current device, else the reason.");
}
