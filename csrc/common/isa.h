// One source, three builds: every kernel file is compiled with MBM_ISA = baseline, avx2 and avx512
// (MBM_LANES = 4, 8, 16) and lives in namespace mbm::MBM_ISA, so inline functions of one build
// never merge with those of another at link time.
#pragma once

#define MBM_CONCAT_(a, b) a##b
#define MBM_CONCAT(a, b) MBM_CONCAT_(a, b)

// Declares `ret fn params;` in the namespace of each build.
#define MBM_PER_ISA(ret, fn, params) \
  namespace baseline {               \
  ret fn params;                     \
  }                                  \
  namespace avx2 {                   \
  ret fn params;                     \
  }                                  \
  namespace avx512 {                 \
  ret fn params;                     \
  }

// Calls the build of `fn` that `active_isa()` names.
#define MBM_CALL(fn, ...)                                                      \
  (::mbm::active_isa() == ::mbm::Isa::kAvx512 ? ::mbm::avx512::fn(__VA_ARGS__) \
   : ::mbm::active_isa() == ::mbm::Isa::kAvx2 ? ::mbm::avx2::fn(__VA_ARGS__)   \
                                              : ::mbm::baseline::fn(__VA_ARGS__))

namespace mbm {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

Isa best_isa();         // the widest that this CPU and OS run
Isa active_isa();       // best_isa() unless set_isa() said otherwise
void set_isa(Isa isa);  // throws std::invalid_argument when the CPU lacks it
const char* isa_name(Isa isa);

}  // namespace mbm
