#include "additive_attention/additive_attention_cuda.h"
#include "additive_attention/cuda_plan.h"
#include "additive_attention/grad_scores.cuh"
#include "additive_attention/grad_terms.cuh"
#include "common/gpu/on_device.h"

namespace mbm {
namespace {

using additive::ceil_div;
using additive::GradScoresMemory;
using additive::GradTermsMemory;
using additive::ScoreTile;

int64_t shared_bytes(int tile, int64_t S, int cluster) {
  const int64_t width = ceil_div(S, 4 * cluster) * 4;
  return additive::of_tile(tile, [&](auto queries) {
    return GradScoresMemory<ScoreTile<queries>>::floats(width, cluster) * 4;
  });
}

int positions(int tile) { return tile == 20 ? ScoreTile<20>::kS : ScoreTile<8>::kS; }

template <class T>
cudaError_t launch_grad_scores(const AdditiveAttentionCudaBackward& args, const gpu::Device& device,
                               cudaStream_t stream, int rows) {
  const auto& in = args.in;
  const auto plan = additive::plan_tiles(
      device, in.B, in.T, in.S, positions,
      [&](int tile, int cluster) { return shared_bytes(tile, in.S, cluster); });
  if (plan.tile == 0) return cudaErrorInvalidValue;
  const gpu::Launch how{in.B * ceil_div(in.T, plan.tile) * plan.cluster, plan.cluster,
                        additive::kThreads,
                        static_cast<size_t>(shared_bytes(plan.tile, in.S, plan.cluster))};
  const auto kernel = plan.tile == 20  ? additive::additive_attention_grad_scores_kernel<T, 20>
                      : plan.tile == 8 ? additive::additive_attention_grad_scores_kernel<T, 8>
                                       : additive::additive_attention_grad_scores_kernel<T, 4>;
  return gpu::launch(kernel, how, stream, args, rows);
}

template <class T, int CHUNK>
cudaError_t launch_grad_terms(const AdditiveAttentionCudaBackward& args, cudaStream_t stream,
                              int rows) {
  const gpu::Launch how{args.in.B * ceil_div(args.in.D, additive::kTermFeatures), 1,
                        additive::kTermThreads, GradTermsMemory<CHUNK>::kFloats * sizeof(float)};
  const auto kernel = additive::additive_attention_grad_terms_kernel<T, CHUNK>;
  return gpu::launch(kernel, how, stream, args, rows);
}

template <class T>
cudaError_t launch(const AdditiveAttentionCudaBackward& args, const gpu::Device& device,
                   cudaStream_t stream) {
  const int rows = static_cast<int>(additive_attention_cuda_rows(args.in.T));
  const cudaError_t error = launch_grad_scores<T>(args, device, stream, rows);
  if (error != cudaSuccess) return error;
  switch (additive::chunk_of(args.in.T)) {
    case 20: return launch_grad_terms<T, 20>(args, stream, rows);
    case 8: return launch_grad_terms<T, 8>(args, stream, rows);
    default: return launch_grad_terms<T, 4>(args, stream, rows);
  }
}

}  // namespace

int64_t additive_attention_cuda_chunk(int64_t T) { return additive::chunk_of(T); }

int64_t additive_attention_cuda_rows(int64_t T) {
  const int64_t chunk = additive::chunk_of(T);
  return ceil_div(T, chunk) * chunk;
}

cudaError_t additive_attention_cuda_bwd(const AdditiveAttentionCudaBackward& args, int device,
                                        cudaStream_t stream) {
  const auto& in = args.in;
  if (in.B == 0 || in.T == 0 || in.S == 0 || in.D == 0 || in.S > kAdditiveAttentionCudaMostS)
    return cudaErrorInvalidValue;
  return gpu::on_device(device, in.dtype, [&](const gpu::Device& found, auto zero) {
    return launch<decltype(zero)>(args, found, stream);
  });
}

}  // namespace mbm
