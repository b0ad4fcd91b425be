// Client requests of callgrind for replay.py: nothing is counted but what lies between the two.
#include <valgrind/callgrind.h>

extern "C" void start() {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

// `name` goes into the profile, which is written at once.
extern "C" void stop(const char* name) {
  CALLGRIND_DUMP_STATS_AT(name);
  CALLGRIND_STOP_INSTRUMENTATION;
}
