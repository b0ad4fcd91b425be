// What follows a tile of sums: residual, activation, pool, and what is saved for the backward.
#pragma once

#include "conv_bias_act/activate.cuh"
#include "conv_bias_act/conv_tile.cuh"

namespace mbm::conv {

MBM_DEVICE void save_z(const ConvCudaSaved& saved, int64_t at, float z) {
  switch (saved.z_dtype) {
    case gpu::Dtype::kFloat32: gpu::store(static_cast<float*>(saved.z), at, z); return;
    case gpu::Dtype::kBFloat16: gpu::store(static_cast<gpu::bfloat16*>(saved.z), at, z); return;
    case gpu::Dtype::kFloat16: gpu::store(static_cast<gpu::float16*>(saved.z), at, z); return;
  }
}

MBM_DEVICE float saved_z(const ConvCudaSaved& saved, int64_t at) {
  switch (saved.z_dtype) {
    case gpu::Dtype::kFloat32: return load<float>(saved.z, at);
    case gpu::Dtype::kBFloat16: return load<gpu::bfloat16>(saved.z, at);
    default: return load<gpu::float16>(saved.z, at);
  }
}

// Of an element of [B, Y'', X'', K].
MBM_DEVICE int64_t saved_at(const ConvCudaSizes& s, int64_t b, int k, int y, int x) {
  return ((b * s.out_y + y) * s.out_x + x) * s.K + k;
}

template <class T>
MBM_DEVICE void emit(const ConvCudaForward& args, int64_t b, int k, int y, int x,
                     const Best& best) {
  const auto& s = args.sizes;
  const float out = pools_first(s.activation) ? activate(s.activation, best.value) : best.value;
  gpu::store(static_cast<T*>(args.y.data), offset(args.y, b, k, y, x), out);
  const int64_t at = saved_at(s, b, k, y, x);
  if (args.saved.places != nullptr)
    args.saved.places[at] = static_cast<uint8_t>(code_of(s.activation, best));
  if (args.saved.z != nullptr) save_z(args.saved, at, best.z);
}

// The outputs of a tile from `mid`, its convolved pixels [mid_rows mid_columns][kPitch].
template <class T>
MBM_DEVICE void emit_tile(const ConvCudaForward& args, const Tile& tile, const Origin& at,
                          const float* mid) {
  const auto& s = args.sizes;
  for_each(tile.rows, tile.columns, channels_last(args.y), [&](int channel, int row, int column) {
    const int k = at.k0 + channel, y = at.row + row, x = at.column + column;
    if (k >= s.K || y >= s.out_y || x >= s.out_x) return;
    Best best;
#pragma unroll 1
    for (int r = 0; r < s.pool_y; ++r)
#pragma unroll 1
      for (int q = 0; q < s.pool_x; ++q) {
        const int i = y * s.pool_stride_y - s.pool_top + r;
        const int j = x * s.pool_stride_x - s.pool_left + q;
        if (i < 0 || i >= s.conv_y || j < 0 || j >= s.conv_x) continue;
        const int pixel =
            (row * s.pool_stride_y + r) * tile.mid_columns + column * s.pool_stride_x + q;
        float z = mid[pixel * kPitch + channel];
        if (args.residual.data != nullptr) z += load_at<T>(args.residual, at.b, k, i, j);
        best.take(pools_first(s.activation) ? z : activate(s.activation, z), z, r * s.pool_x + q);
      }
    emit<T>(args, at.b, k, y, x, best);
  });
}

}  // namespace mbm::conv
