// How many threads are worth starting while other processes want the cores too.
//
// A team waits for its last thread, and a thread that lost its core comes back after a time slice
// of milliseconds. Where the caller waited that long and for half of the time that the team took,
// so that half the threads had done as well, the next teams are halved, down to one thread, for a
// pause that grows while it keeps happening; after each pause they may double again. Results do not
// depend on the size of a team.
#pragma once

#include <cstdint>

namespace mbm {

// A size of 1 to `asked` for a team that is about to start.
int granted_team(int asked) noexcept;

// Tells of a team of that size: how long it took, and how long its caller waited for others in it.
// Called by the thread that started it.
void note_team(int team, int64_t taken_ns, int64_t waited_ns) noexcept;

int64_t monotonic_ns() noexcept;

// Nanoseconds that this thread slept at barriers since it last asked.
void add_barrier_sleep(int64_t ns) noexcept;
int64_t take_barrier_sleep() noexcept;

}  // namespace mbm
