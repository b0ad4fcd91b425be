// Whether CUDA code of this build runs on the machine at hand.
#pragma once

namespace mbm {

// nullptr when a kernel ran on the current device and wrote what it should; else the reason, a
// string that lives as long as the process. Needs no driver to be called.
const char* cuda_probe();

}  // namespace mbm
