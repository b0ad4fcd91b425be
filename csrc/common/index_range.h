// What checks ask of indices before a kernel trusts them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace mbm {

struct IndexRange {
  int64_t low, high;  // of those that are not `ignored`; low > high where there is none
  int64_t ignored;    // how many are
};

// index [n], read only.
inline IndexRange index_range(const int64_t* index, int64_t n, int64_t ignored) {
  IndexRange found{std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min(), 0};
  for (int64_t i = 0; i < n; ++i) {
    if (index[i] == ignored) {
      ++found.ignored;
      continue;
    }
    found.low = std::min(found.low, index[i]);
    found.high = std::max(found.high, index[i]);
  }
  return found;
}

}  // namespace mbm
