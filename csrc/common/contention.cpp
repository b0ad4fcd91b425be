#include "common/contention.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>

namespace mbm {
namespace {

constexpr int64_t kMillisecond = 1000000;
// Below it a thread that wakes up or has more to do is late.
constexpr int64_t kLong = kMillisecond;
constexpr int64_t kShortestPause = 20 * kMillisecond, kLongestPause = 640 * kMillisecond;
constexpr int64_t kRecent = 1000 * kMillisecond;
constexpr int kAny = 1 << 20;

// Threads share these without a lock: what one overwrites of another is a guess as good.
std::atomic<int> most{kAny};       // threads in a team
std::atomic<int64_t> until{0};     // when that is doubled
std::atomic<int64_t> pause{0};     // the last one
std::atomic<int64_t> switches{0};  // involuntary ones of this process, when last looked at
std::atomic<int64_t> looked{0};    // when that was
thread_local int64_t slept = 0;

// Whether a thread of this process has lost its core since a moment ago. A team may also wait for
// the one that has the most to do.
bool lost_a_core(int64_t now) {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return false;
  const int64_t found = usage.ru_nivcsw;
  const int64_t before = switches.exchange(found, std::memory_order_relaxed);
  return now - looked.exchange(now, std::memory_order_relaxed) < kRecent && found > before;
}

}  // namespace

int64_t monotonic_ns() noexcept {
  using std::chrono::steady_clock;
  return std::chrono::nanoseconds(steady_clock::now().time_since_epoch()).count();
}

int granted_team(int asked) noexcept {
  const int now = most.load(std::memory_order_relaxed);
  if (now >= asked) return asked;
  const int64_t time = monotonic_ns();
  if (time < until.load(std::memory_order_relaxed)) return now;
  most.store(now * 2 >= asked ? kAny : now * 2, std::memory_order_relaxed);
  until.store(time + pause.load(std::memory_order_relaxed), std::memory_order_relaxed);
  return std::min(now * 2, asked);
}

void note_team(int team, int64_t taken_ns, int64_t waited_ns) noexcept {
  if (waited_ns < kLong || waited_ns * 2 < taken_ns) {
    const int64_t last = pause.load(std::memory_order_relaxed);
    if (last > 0) pause.store(last - last / 16 - 1, std::memory_order_relaxed);
    return;
  }
  const int64_t now = monotonic_ns();
  if (!lost_a_core(now)) return;
  const int64_t longer = pause.load(std::memory_order_relaxed) * 2;
  pause.store(std::clamp(longer, kShortestPause, kLongestPause), std::memory_order_relaxed);
  until.store(now + pause.load(std::memory_order_relaxed), std::memory_order_relaxed);
  most.store(std::max(1, team / 2), std::memory_order_relaxed);
}

void add_barrier_sleep(int64_t ns) noexcept { slept += ns; }

int64_t take_barrier_sleep() noexcept {
  const int64_t found = slept;
  slept = 0;
  return found;
}

}  // namespace mbm
