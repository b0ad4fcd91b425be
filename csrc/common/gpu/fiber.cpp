#include "common/gpu/fiber.h"

#include <cstdint>

namespace mbm::emulation {

#if defined(__x86_64__)

// ucontext asks the kernel for the signal mask at each switch, which takes 30 times as long.
extern "C" void mbm_fiber_switch(void** save, void* stack);
extern "C" void mbm_fiber_begin();
asm(R"(
  .text
  .hidden mbm_fiber_switch
  .globl mbm_fiber_switch
mbm_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .hidden mbm_fiber_begin
  .globl mbm_fiber_begin
mbm_fiber_begin:
  movq %r12, %rdi
  callq *%rbx
  ud2
)");

void Fiber::begin(Entry entry, void* argument) {
  // What mbm_fiber_switch pops: r15 r14 r13 r12 rbx rbp and the return address, after which the
  // stack is aligned to 16 bytes, as it must be before a call.
  const auto end = reinterpret_cast<uintptr_t>(stack_.get() + kStack) & ~uintptr_t{15};
  auto* top = reinterpret_cast<void**>(end) - 9;
  top[0] = top[1] = top[2] = nullptr;
  top[3] = argument;
  top[4] = reinterpret_cast<void*>(entry);
  top[5] = nullptr;
  top[6] = reinterpret_cast<void*>(mbm_fiber_begin);
  top[7] = top[8] = nullptr;
  inside_ = top;
}

void Fiber::enter() { mbm_fiber_switch(&outside_, inside_); }
void Fiber::leave() { mbm_fiber_switch(&inside_, outside_); }

#else

void Fiber::run(unsigned high, unsigned low) {
  auto* fiber = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
  fiber->entry_(fiber->argument_);
}

void Fiber::begin(Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_.get();
  inside_.uc_stack.ss_size = kStack;
  inside_.uc_link = nullptr;
  const auto self = reinterpret_cast<uintptr_t>(this);
  makecontext(&inside_, reinterpret_cast<void (*)()>(run), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
}

void Fiber::enter() { swapcontext(&outside_, &inside_); }
void Fiber::leave() { swapcontext(&inside_, &outside_); }

#endif

}  // namespace mbm::emulation
