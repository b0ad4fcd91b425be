// The module of the CUDA kernels, whose bind_cuda.cpp register themselves. The CUDA runtime is
// linked statically, so that it imports on a machine without a driver. With MBM_EMULATED the same
// kernels run on the host (gpu/emulation.h).
#include "common/gpu/bind.h"
#include "common/gpu/launch.h"
#include "common/probe.h"

namespace {

void bind_common(py::module_& m) {
  m.def(
      "max_cluster",
      [](int device) {
        mbm::gpu::Device found;
        mbm::gpu::check(mbm::gpu::find_device(device, &found), "max_cluster");
        return found.max_cluster;
      },
      "Blocks of the largest portable cluster; 1 where the device has none.");
  for (const Binding::Function bind : Binding::all()) bind(m);
}

}  // namespace

#ifdef MBM_EMULATED

PYBIND11_MODULE(_C_cuda_emulated, m) {
  m.doc() = "CUDA kernels of mbm_kernels on the host, for tests.";
  m.def(
      "set_device",
      [](int multiprocessors, int shared, int max_cluster) {
        mbm::gpu::emulated_device() = {multiprocessors, shared, max_cluster};
      },
      "What launches see: multiprocessors, bytes of shared memory, blocks of a cluster.");
  m.def("drop", &mbm::emulation::drop, "Barriers of this name do nothing from now on.");
  m.def("sites", &mbm::emulation::sites, "Barriers reached, each with how often by one thread.");
  bind_common(m);
}

#else

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
  bind_common(m);
}

#endif
