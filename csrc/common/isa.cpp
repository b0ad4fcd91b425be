#include "common/isa.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace mbm {
namespace {

std::atomic<int> chosen{-1};

bool cpu_runs(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
    // The avx512 build uses F, BW, DQ and VL; all came together from Skylake-X and Zen 4 on.
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx2:
    case Isa::kAvx512Lowered:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default: return true;
  }
}

bool is_built(Isa isa) {
#if defined(MBM_ONLY_ISA)
#define MBM_TEXT_(x) #x
#define MBM_TEXT(x) MBM_TEXT_(x)
  return std::string(MBM_TEXT(MBM_ONLY_ISA)) == isa_name(isa);
#elif defined(MBM_LOWERED)
  return isa <= Isa::kAvx512Lowered;
#else
  return isa <= Isa::kAvx512;
#endif
}

}  // namespace

bool runs(Isa isa) { return is_built(isa) && cpu_runs(isa); }

Isa best_isa() {
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline})
    if (runs(isa)) return isa;
  return Isa::kAvx512Lowered;  // a build of that alone
}

Isa active_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(best_isa());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(Isa isa) {
  if (isa == Isa::kAvx512 && !runs(isa) && runs(Isa::kAvx512Lowered)) isa = Isa::kAvx512Lowered;
  if (!runs(isa))
    throw std::invalid_argument(std::string("this build and CPU run up to ") +
                                isa_name(best_isa()) + ", not " + isa_name(isa));
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Lowered: return "avx512_lowered";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace mbm
