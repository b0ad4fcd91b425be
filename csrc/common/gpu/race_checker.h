// What ThreadSanitizer is told of emulated threads, with MBM_CHECK_RACES. The emulation itself is
// compiled without it, since its own state is not the kernel's.
#pragma once

#ifdef MBM_CHECK_RACES

extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);  // 1: orders no memory
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read8(void* address);
void __tsan_write8(void* address);
}

namespace mbm::emulation {

constexpr bool kChecksRaces = true;

// A thread of execution in the checker's eyes; its owner begins and ends it.
class CheckedThread {
 public:
  void begin() { fiber_ = __tsan_create_fiber(0); }
  void end() { __tsan_destroy_fiber(fiber_); }
  void enter() { __tsan_switch_to_fiber(fiber_, 1); }
  static void* owner() { return __tsan_get_current_fiber(); }
  static void leave(void* owner) { __tsan_switch_to_fiber(owner, 1); }
  // All that the thread did happens before what its owner does next.
  void join(void* owner) {
    __tsan_switch_to_fiber(fiber_, 1);
    __tsan_switch_to_fiber(owner, 0);
  }

 private:
  void* fiber_ = nullptr;
};

inline void acquire(void* token) { __tsan_acquire(token); }
inline void release(void* token) { __tsan_release(token); }
// As if the thread that runs had read or written the 8 bytes.
inline void note_read(void* address) { __tsan_read8(address); }
inline void note_write(void* address) { __tsan_write8(address); }

}  // namespace mbm::emulation

#else

namespace mbm::emulation {

constexpr bool kChecksRaces = false;

class CheckedThread {
 public:
  void begin() {}
  void end() {}
  void enter() {}
  static void* owner() { return nullptr; }
  static void leave(void*) {}
  void join(void*) {}
};

inline void acquire(void*) {}
inline void release(void*) {}
inline void note_read(void*) {}
inline void note_write(void*) {}

}  // namespace mbm::emulation

#endif
