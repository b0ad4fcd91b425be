// One source, three builds: every kernel file is compiled with MBM_ISA = baseline, avx2 and avx512
// (MBM_LANES = 4, 8, 16) and lives in namespace mbm::MBM_ISA, so inline functions of one build
// never merge with those of another at link time. A fourth, avx512_lowered, has 16 lanes made of
// AVX2 instructions: it tests the avx512 code where no CPU runs it, and nothing else picks it.
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
  }                                  \
  namespace avx512_lowered {         \
  ret fn params;                     \
  }

// Calls the build of `fn` that `active_isa()` names. Tests compile one build alone, or the fourth.
#if defined(MBM_ONLY_ISA)
#define MBM_CALL(fn, ...) ::mbm::MBM_ONLY_ISA::fn(__VA_ARGS__)
#else
#if defined(MBM_LOWERED)
#define MBM_CALL_AVX512(fn, ...)                                                              \
  (::mbm::active_isa() == ::mbm::Isa::kAvx512Lowered ? ::mbm::avx512_lowered::fn(__VA_ARGS__) \
                                                     : ::mbm::avx512::fn(__VA_ARGS__))
#else
#define MBM_CALL_AVX512(fn, ...) ::mbm::avx512::fn(__VA_ARGS__)
#endif
#define MBM_CALL(fn, ...)                                                        \
  (::mbm::active_isa() >= ::mbm::Isa::kAvx512 ? MBM_CALL_AVX512(fn, __VA_ARGS__) \
   : ::mbm::active_isa() == ::mbm::Isa::kAvx2 ? ::mbm::avx2::fn(__VA_ARGS__)     \
                                              : ::mbm::baseline::fn(__VA_ARGS__))
#endif

namespace mbm {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Lowered = 3 };

bool runs(Isa isa);  // whether this build holds it and this CPU and OS run it
Isa best_isa();      // the widest that runs, never kAvx512Lowered
Isa active_isa();    // best_isa() unless set_isa() said otherwise
// Throws std::invalid_argument when it does not run; kAvx512 may then be kAvx512Lowered.
void set_isa(Isa isa);
const char* isa_name(Isa isa);

}  // namespace mbm
