// Convolutions as products of matrices: slices of the sum over taps and channels, register tiles,
// and the epilogue on each tile while it is in L1.
#pragma once

#include "conv_bias_act/conv_epilogue.h"
#include "conv_bias_act/conv_micro.h"

namespace mbm::MBM_ISA {

// Terms of the sum over taps and channels: a panel of a slice stays in L1 while the tiles pass.
constexpr int64_t kSliceDepth = 256;

// Long sums in registers, put aside after each slice: a sum of slices rounds less than a long one.
template <int M, int N>
class SlicedSums {
 public:
  // Of sums that grow by `depth` terms at a time.
  explicit SlicedSums(int64_t depth)
      : of_slice_(std::max<int64_t>(1, kSliceDepth / depth)), left_(of_slice_) {}

  // Before the next terms.
  inline __attribute__((always_inline)) void next(vf (&acc)[M][N]) {
    if (left_ == 0) {
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) {
          total_[i][j] = sliced_ ? total_[i][j] + acc[i][j] : acc[i][j];
          acc[i][j] = zero();
        }
      sliced_ = true;
      left_ = of_slice_;
    }
    --left_;
  }

  inline __attribute__((always_inline)) void end(vf (&acc)[M][N]) const {
    if (!sliced_) return;
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) acc[i][j] = acc[i][j] + total_[i][j];
  }

 private:
  vf total_[M][N];
  int64_t of_slice_, left_;
  bool sliced_ = false;
};

// A sum of `depth` terms in even slices.
struct Slices {
  int64_t depth, count;
  explicit Slices(int64_t depth) : depth(depth), count((depth + kSliceDepth - 1) / kSliceDepth) {}
  int64_t begin(int64_t slice) const { return slice * depth / count; }
  int64_t longest() const { return (depth + count - 1) / count; }
};

// A tile of sums, and what becomes of it. Rows are pixels and columns channels, or the reverse;
// a row's columns lie side by side in y and in the residual.
struct SumTile {
  const float* sums;  // row i at sums + i * kPanel
  int rows, columns;
  float* y;               // row i at y + offsets[i], or y + i * step
  const float* residual;  // as y, by its own offsets, or null
  const int64_t *offsets, *residual_offsets;
  int64_t step, residual_step;
  const float* bias;  // a value for each column, or with bias_by_row for each row; or null
  uint8_t* places;    // row i, column j at places + i * place_row + j * place_column, or null
  float* z;           // as places
  int64_t place_row, place_column;
};

// fixed: the activation.
template <int fixed, bool bias_by_row>
void finish_tile(const SumTile& t) {
  constexpr Activation activation = static_cast<Activation>(fixed);
  for (int half = 0; half < t.columns; half += kLanes) {
    const int n = std::min(kLanes, t.columns - half);
    const vf across = !bias_by_row && t.bias ? load_channels(t.bias + half, n) : zero();
    for (int i = 0; i < t.rows; ++i) {
      vf z = load(t.sums + i * kPanel + half);
      if (t.bias) z = z + (bias_by_row ? set1(t.bias[i]) : across);
      if (t.residual) {
        const int64_t at = t.residual_offsets ? t.residual_offsets[i] : i * t.residual_step;
        z = z + load_channels(t.residual + at + half, n);
      }
      const vf a = activate(activation, z);
      store_channels(t.y + (t.offsets ? t.offsets[i] : i * t.step) + half, a, n);
      if (!t.places) continue;
      const int64_t at = i * t.place_row + half * t.place_column;
      const vi places = mark_low(activation, a, vi{});
      if (t.place_column == 1) {
        store_bytes(t.places + at, places, n);
        if (t.z) store_channels(t.z + at, z, n);
      } else {
        for (int j = 0; j < n; ++j) {
          t.places[at + j * t.place_column] = static_cast<uint8_t>(places[j]);
          if (t.z) t.z[at + j * t.place_column] = z[j];
        }
      }
    }
  }
}

using FinishTileFn = void (*)(const SumTile&);

template <bool bias_by_row>
FinishTileFn finish_tile_for(Activation activation) {
  static constexpr FinishTileFn table[] = {
      finish_tile<0, bias_by_row>, finish_tile<1, bias_by_row>, finish_tile<2, bias_by_row>,
      finish_tile<3, bias_by_row>, finish_tile<4, bias_by_row>, finish_tile<5, bias_by_row>,
      finish_tile<6, bias_by_row>, finish_tile<7, bias_by_row>, finish_tile<8, bias_by_row>,
      finish_tile<9, bias_by_row>};
  return table[static_cast<int>(activation)];
}

}  // namespace mbm::MBM_ISA
