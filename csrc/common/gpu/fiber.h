// A stack of its own on which code runs in turns with its owner's.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace mbm::emulation {

class Fiber {
 public:
  using Entry = void (*)(void*);

  // Frames of kernels are small; what the stack does not reach costs no memory.
  static constexpr size_t kStack = 128 << 10;

  Fiber() : stack_(new char[kStack]) {}

  // The next enter() begins entry(argument), which must never return: it ends by a last leave().
  void begin(Entry entry, void* argument);
  void enter();  // by the owner: runs the fiber until it leaves
  void leave();  // by the fiber: goes on after enter()

 private:
  std::unique_ptr<char[]> stack_;
#if defined(__x86_64__)
  void* inside_ = nullptr;  // stack pointers of who does not run
  void* outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  static void run(unsigned high, unsigned low);
#endif
};

}  // namespace mbm::emulation
