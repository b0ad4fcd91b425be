// Which kernels there are: units that a cluster's registers hold, and blocks of a cluster.
#pragma once

#include <type_traits>

#include "common/gpu/launch.h"
#include "gru/gru_cuda.h"

namespace mbm::gru {

constexpr int kClusters[] = {16, 8, 4};

template <int N>
using Constant = std::integral_constant<int, N>;

// The least that holds H, 0 where none does.
inline int held_units(int64_t H) {
  for (int units : {64, 128, 256, 512, 768})
    if (H <= units) return units;
  return 0;
}

// visit(units, cluster) as constants, where there is such a kernel for T.
template <class T, class Visit>
cudaError_t with_shape(int64_t H, int cluster, const Visit& visit) {
  constexpr bool kWide = sizeof(T) == 4;
  switch (held_units(H) * 100 + cluster) {
    case 6404: return visit(Constant<64>{}, Constant<4>{});
    case 12804: return visit(Constant<128>{}, Constant<4>{});
    case 25608: return visit(Constant<256>{}, Constant<8>{});
    case 51216: return visit(Constant<512>{}, Constant<16>{});
  }
  if constexpr (!kWide) {
    switch (held_units(H) * 100 + cluster) {
      case 25604: return visit(Constant<256>{}, Constant<4>{});
      case 51208: return visit(Constant<512>{}, Constant<8>{});
      case 76816: return visit(Constant<768>{}, Constant<16>{});
    }
  }
  return cudaErrorInvalidValue;
}

// Clusters of 8 rows each.
inline int64_t clusters_of(const GruCudaSizes& sizes) {
  return sizes.directions * gpu::ceil_div(sizes.B, 8);
}

template <class S>
gpu::Launch launch_of(const GruCudaSizes& sizes) {
  return {clusters_of(sizes) * sizes.cluster, sizes.cluster, S::kThreads, S::kBytes};
}

}  // namespace mbm::gru
