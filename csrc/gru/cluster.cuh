// The exchange over a cluster: each step's vectors go from every block to every block of the
// cluster by asynchronous stores into shared memory, which an mbarrier counts.
#pragma once

#include "gru/resident.cuh"

namespace mbm::gru {

// Which rows a cluster has, and how long they are.
struct ClusterRows {
  int direction, b0, longest;

  MBM_DEVICE ClusterRows(const GruCudaSizes& sizes, int cluster) {
    const int groups = static_cast<int>((sizes.B + kRows - 1) / kRows);
    const int index = gpu::block() / cluster;
    direction = index / groups;
    b0 = index % groups * kRows;
    longest = longest_row(sizes, b0);
  }
};

// The vectors of each step, as every block of the cluster gets them: two buffers in turn.
template <class S>
struct ClusterExchange {
  using T = typename S::Element;
  static constexpr int kThreads = S::kThreads;
  static constexpr int kBytes =
      2 * S::kVectors + BlockMemory<S>::kBytes + 2 * sizeof(gpu::Mbarrier);  // of shared memory

  char* states = gpu::shared();
  BlockMemory<S> memory{states + 2 * S::kVectors};
  gpu::Mbarrier* full = reinterpret_cast<gpu::Mbarrier*>(memory.held + S::kHeld);

  MBM_DEVICE T* row(int step, int b) const {
    return reinterpret_cast<T*>(states + (step & 1) * S::kVectors + b * S::kRowBytes);
  }
  // vector(row, k) of a step, for Resident.
  MBM_DEVICE auto vectors(int step) const {
    return [this, step](int b, int k) { return gpu::load_words(row(step, b) + k); };
  }

  // Before a cluster barrier; of steps 1 .. last vectors are sent.
  MBM_DEVICE void begin(int last) const {
    if (gpu::thread() != 0) return;
    for (int step = 1; step <= 2; ++step) {
      gpu::mbarrier_init(full + (step & 1), 1);
      if (step <= last) expect(step);
    }
  }
  MBM_DEVICE void expect(int step) const {
    gpu::mbarrier_expect(full + (step & 1), kRows * (S::kRowBytes - 64));
  }
  MBM_DEVICE void wait(int step) const {
    gpu::mbarrier_wait("states received", full + (step & 1), (step - 1) / 2 & 1);
  }
  // After a block barrier that follows wait(step).
  MBM_DEVICE void end_reading(int step, int last) const {
    if (gpu::thread() == 0 && step > 0 && step + 2 <= last) expect(step + 2);
  }

  // x, of place k of the depth, to all blocks; kQuad lanes with consecutive k share the stores.
  MBM_DEVICE void send(int step, int b, int k, float x) const {
    if (b >= kRows) return;  // a warp without rows
    const uint4 words = gpu::quad_of_neighbours<T>(x);
    const int mine = gpu::lane() % gpu::kQuad<T>;
    auto* to = reinterpret_cast<uint4*>(row(step, b) + k - mine);
#pragma unroll
    for (int first = 0; first < S::kBlocks; first += gpu::kQuad<T>)
      if (first + gpu::kQuad<T> <= S::kBlocks || first + mine < S::kBlocks)
        gpu::store_peer_async(to, full + (step & 1), first + mine, words);
  }
};

}  // namespace mbm::gru
