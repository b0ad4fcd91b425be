// The multiply-add rate of the machine, for the share of the limit that benchmarks report.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mbm {

// Operations of one iteration of one thread: an FMA counts as two.
MBM_PER_ISA(int64_t, peak_operations, ())
// `iterations` rounds of independent FMAs in registers on each thread; returns their sum, so that
// the work is needed.
MBM_PER_ISA(float, peak_run, (int64_t iterations, int num_threads))

}  // namespace mbm
