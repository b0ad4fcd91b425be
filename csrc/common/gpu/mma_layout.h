// Where the lanes of a warp hold the elements of mma.m16n8k16: d [16, 8] += a [16, 16] b [16, 8].
// Two elements of 16 bits lie in a register, the first in its low half. Of m16n8k8 in tf32, a [16,
// 8] and b [8, 8], each lies in a register of its own; d is the same.
#pragma once

namespace mbm::gpu {

struct MmaPlace {
  int row, column;
};

constexpr MmaPlace mma_place_of_a(int lane, int i) {  // i of 8
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
constexpr MmaPlace mma_place_of_b(int lane, int i) {  // i of 4
  return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
}
constexpr MmaPlace mma_place_of_wide_a(int lane, int i) {  // i of 4
  return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4};
}
constexpr MmaPlace mma_place_of_wide_b(int lane, int i) {  // i of 2
  return {lane % 4 + i * 4, lane / 4};
}
constexpr MmaPlace mma_place_of_d(int lane, int i) {  // i of 4
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

}  // namespace mbm::gpu
