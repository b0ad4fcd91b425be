// Where csrc/common/gpu/mma_layout.h differs from CuTe's traits of the same instruction: the count.
#include "common/gpu/mma_layout.h"

#include <cstdio>
#include <cute/atom/mma_traits_sm80.hpp>

namespace {

// CuTe's layouts number an element by columns.
int number(mbm::gpu::MmaPlace at, int rows) { return at.row + rows * at.column; }

template <class Operation>
int differences() {
  using Traits = cute::MMA_Traits<Operation>;
  int found = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i)
      found += typename Traits::ALayout{}(lane, i) != number(mbm::gpu::mma_place_of_a(lane, i), 16);
    for (int i = 0; i < 4; ++i) {
      const auto [k, column] = mbm::gpu::mma_place_of_b(lane, i);
      found += typename Traits::BLayout{}(lane, i) != number({column, k}, 8);
      found += typename Traits::CLayout{}(lane, i) != number(mbm::gpu::mma_place_of_d(lane, i), 16);
    }
  }
  return found;
}

// In tf32.
int wide_differences() {
  using Traits = cute::MMA_Traits<cute::SM80_16x8x8_F32TF32TF32F32_TN>;
  int found = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i)
      found += Traits::ALayout{}(lane, i) != number(mbm::gpu::mma_place_of_wide_a(lane, i), 16);
    for (int i = 0; i < 2; ++i) {
      const auto [k, column] = mbm::gpu::mma_place_of_wide_b(lane, i);
      found += Traits::BLayout{}(lane, i) != number({column, k}, 8);
    }
    for (int i = 0; i < 4; ++i)
      found += Traits::CLayout{}(lane, i) != number(mbm::gpu::mma_place_of_d(lane, i), 16);
  }
  return found;
}

}  // namespace

int main() {
  std::printf("%d\n", differences<cute::SM80_16x8x16_F32BF16BF16F32_TN>() +
                          differences<cute::SM80_16x8x16_F32F16F16F32_TN>() + wide_differences());
  return 0;
}
