// Who computes what: rows by falling length, and threads in a grid of row groups by unit blocks.
#pragma once

#include <new>

#include "common/gemm.h"
#include "gru/gru.h"

namespace mbm::MBM_ISA {

// Rank = position in the batch ordered by falling length, so the rows active at step t are the
// ranks below active[t], and (t, rank) is row first[t] + rank of every compact array.
class Schedule {
 public:
  Schedule(int64_t T, int64_t B, const int64_t* lengths)
      : memory_(sizeof(int64_t) * static_cast<size_t>(B + 3 * T + 3)) {
    order = memory_.as<int64_t>();
    active = order + B;
    first = active + T;
    if (!lengths) {
      for (int64_t b = 0; b < B; ++b) order[b] = b;
      for (int64_t t = 0; t < T; ++t) active[t] = B;
    } else {
      sort_rows(T, B, lengths, first + T + 1);
    }
    first[0] = 0;
    for (int64_t t = 0; t < T; ++t) first[t + 1] = first[t] + active[t];
    rows = first[T];
  }

  int64_t* order;   // [B]: the row of each rank
  int64_t* active;  // [T]: ranks with a step t
  int64_t* first;   // [T + 1]
  int64_t rows;     // of a compact array

 private:
  void sort_rows(int64_t T, int64_t B, const int64_t* lengths, int64_t* place) {  // place [T + 2]
    const auto length = [&](int64_t b) {
      return lengths[b] < 0 ? 0 : lengths[b] > T ? T : lengths[b];
    };
    for (int64_t l = 0; l <= T + 1; ++l) place[l] = 0;
    for (int64_t b = 0; b < B; ++b) ++place[length(b)];
    // From counts per length to the number of longer rows.
    int64_t longer = 0;
    for (int64_t l = T; l >= 0; --l) {
      const int64_t count = place[l];
      place[l] = longer;
      longer += count;
    }
    for (int64_t t = 0; t < T; ++t) active[t] = place[t];
    for (int64_t b = 0; b < B; ++b) order[place[length(b)]++] = b;
  }

  Scratch memory_;
};

// Bytes of weights that stay in a core's L2 from step to step.
constexpr int64_t kKeptWeights = 768 << 10;

struct Grid {
  int groups;  // of rows; groups never wait for one another
  int units;   // threads of a group, which share its rows and meet at a barrier once a step
};

inline Grid thread_grid(int team, int64_t B, int64_t H) {
  const int64_t blocks = panels_of(H);
  const int64_t rows_each = B / team;
  // Rows apart when the whole of W_hh stays in a core's L2, or is read for rows enough to hide it:
  // 16 bytes a cycle from L3 feed 24 rows.
  const bool weights_fit = 12 * H * H <= kKeptWeights;
  if (rows_each >= 24 || (rows_each >= 6 && weights_fit)) return {team, 1};
  if (blocks >= team) return {1, team};
  const int units = blocks > 0 ? static_cast<int>(blocks) : 1;
  const int64_t groups = team / units < (B + 5) / 6 ? team / units : (B + 5) / 6;
  return {groups > 0 ? static_cast<int>(groups) : 1, units};
}

// Multiply-adds (5 us) below which waking a thread does not pay.
constexpr int64_t kSerialWork = 300000;

// Threads for `work` multiply-adds over all T steps. A barrier a step (0.3 us) does not pay for
// less than 40,000 in the step's recurrent product, unless there are rows enough to do without.
inline int threads_for(int num_threads, int64_t work, int64_t T, int64_t B, int64_t H) {
  if (num_threads <= 1 || work < kSerialWork) return 1;
  return T > 1 && B / num_threads < 6 && 3 * B * H * H < 40000 ? 1 : num_threads;
}

// The share of one thread. Ranks are dealt in turn, so that groups get equal lengths.
struct Share {
  int group, groups;
  int64_t rows;         // local row i is rank group + i * groups
  int64_t rows_before;  // of lower groups: where this group's rows begin in shared buffers
  int64_t block_begin, block_end;  // unit blocks of kPanel
  bool idle;

  Share(int thread, Grid grid, int64_t B, int64_t H)
      : group(thread / grid.units), groups(grid.groups), idle(group >= grid.groups) {
    if (idle) return;
    rows = B / groups + (group < B % groups);
    rows_before = B / groups * group + (group < B % groups ? group : B % groups);
    const int64_t unit = thread % grid.units, blocks = panels_of(H);
    block_begin = unit * blocks / grid.units;
    block_end = (unit + 1) * blocks / grid.units;
  }
  int64_t rank(int64_t row) const { return group + row * groups; }
  int64_t rows_of(int64_t active) const {
    return active <= group ? 0 : (active - group + groups - 1) / groups;
  }
};

// begin .. end, forwards in even steps and backwards in odd ones: what a cache smaller than the
// weights still holds of them is where the last step ended.
struct Zigzag {
  int64_t begin, end, step;
  int64_t count() const { return end - begin; }
  int64_t operator[](int64_t i) const { return step % 2 ? end - 1 - i : begin + i; }
};

class Barriers {
 public:
  explicit Barriers(int count) : memory_(sizeof(Barrier) * static_cast<size_t>(count)) {
    for (int i = 0; i < count; ++i) new (memory_.as<Barrier>() + i) Barrier;
  }
  Barrier& operator[](int group) const { return memory_.as<Barrier>()[group]; }

 private:
  Scratch memory_;
};

// Whether each half of the threads takes one of two directions, which wait for one another only at
// the end: fewer then meet at a step's barrier, at two threads none. Not for few rows with weights
// that L2 does not keep: all threads on one direction keep more of them (B 1, H 512: 1.06 ms, 1.27
// at once).
inline bool halves(const GruSequence& s, int num_threads) {
  if (num_threads % 2 != 0) return false;
  return s.B >= 8 || 12 * s.H * s.H / (num_threads / 2) <= kKeptWeights;
}

// Direction(args, threads for its steps, threads): run_share(thread, team) by `threads()` threads,
// then finish() by one.
template <class Direction, class Args>
void run_directions(const Args* args, int count, int num_threads) {
  if (count == 2 && halves(args[0].sequence, num_threads)) {
    Direction first(args[0], num_threads / 2, num_threads);
    Direction second(args[1], num_threads / 2, num_threads);
    if (first.work() + second.work() >= kSerialWork) {
      parallel_region(first.threads() + second.threads(), [&](int thread, int team) {
        const int lower = team / 2;
        if (thread < lower || team == 1) first.run_share(thread, team == 1 ? 1 : lower);
        if (thread >= lower) second.run_share(thread - lower, team - lower);
      });
      first.finish();
      second.finish();
      return;
    }
  }
  for (int i = 0; i < count; ++i) {
    Direction direction(args[i], num_threads, num_threads);
    parallel_region(direction.threads(),
                    [&](int thread, int team) { direction.run_share(thread, team); });
    direction.finish();
  }
}

inline void clear_row(float* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = 0.0f;
}

}  // namespace mbm::MBM_ISA
