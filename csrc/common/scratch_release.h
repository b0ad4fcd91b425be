// Gives back the working memory that scratch.h keeps between calls, so that a measurement of a
// call's memory counts it.
#pragma once

#include "common/isa.h"

namespace mbm {

// Of the calling thread and of the OpenMP pool's first `num_threads`.
MBM_PER_ISA(void, release_scratch, (int num_threads))

}  // namespace mbm
