#include <limits>

#include "common/gpu/on_device.h"
#include "gru_cell/cell.cuh"
#include "gru_cell/gru_cell_cuda.h"

namespace mbm {
namespace {

using gpu::ceil_div;

struct CellPlan {
  int rows = 0;
  int cluster = 1;
};

// The least time: turns of all multiprocessors, times the chunks of a warp and what follows them,
// which is about 8 chunks' instructions.
template <class T>
CellPlan plan_cell(const GruCellCudaForward& args, const gpu::Device& device) {
  const int64_t chunks = ceil_div(args.C, gpu::kChunk<T>) + ceil_div(args.H, gpu::kChunk<T>);
  CellPlan best;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int rows : {8, sizeof(T) == 4 ? 16 : 32})
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2) {
      const int64_t blocks = ceil_div(args.B, rows) * ceil_div(args.H, gru::kCellUnits) * cluster;
      const int64_t products = sizeof(T) == 4 ? 25 * rows : 7 * rows / 8;
      const int64_t cost = ceil_div(blocks, device.multiprocessors) * (6 + products) *
                           (ceil_div(chunks, gru::kCellWarps * cluster) + 8);
      if (cost < least) least = cost, best = {rows, cluster};
    }
  return best;
}

template <class T, int ROWS>
cudaError_t launch(const GruCellCudaForward& args, int cluster, cudaStream_t stream) {
  const int64_t tiles = ceil_div(args.B, ROWS) * ceil_div(args.H, gru::kCellUnits);
  const gpu::Launch how{tiles * cluster, cluster, gru::kCellThreads,
                        gru::CellMemory<ROWS>::kFloats * sizeof(float)};
  return gpu::launch(gru::gru_cell_fwd_kernel<T, ROWS>, how, stream, args);
}

}  // namespace

cudaError_t gru_cell_cuda_fwd(const GruCellCudaForward& args, int device, cudaStream_t stream) {
  if (args.B == 0 || args.H == 0) return cudaSuccess;
  return gpu::on_device(device, args.dtype, [&](const gpu::Device& found, auto zero) {
    using T = decltype(zero);
    const CellPlan plan = plan_cell<T>(args, found);
    if (plan.rows == 8) return launch<T, 8>(args, plan.cluster, stream);
    return launch<T, sizeof(T) == 4 ? 16 : 32>(args, plan.cluster, stream);
  });
}

cudaError_t gru_cell_cuda_bwd(const GruCellCudaBackward& args, int device, cudaStream_t stream) {
  if (args.B == 0 || args.H == 0) return cudaSuccess;
  const gpu::Launch how{ceil_div(args.B * args.H, gru::kCellThreads), 1, gru::kCellThreads, 0};
  return gpu::on_device(device, args.dtype, [&](const gpu::Device&, auto zero) {
    return gpu::launch(gru::gru_cell_bwd_kernel<decltype(zero)>, how, stream, args);
  });
}

}  // namespace mbm
