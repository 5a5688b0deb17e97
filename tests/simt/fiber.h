// SPDX-License-Identifier: MIT
//
// Fibers: user-level threads that switch only when asked. The host runner gives one to every CUDA
// thread.
//
// On x86-64 a switch saves the six callee-saved registers and the stack pointer, nothing else;
// elsewhere (or with KIMI_SIMT_UCONTEXT defined) it is swapcontext, which also makes a system call
// for the signal mask. Stacks are mapped with a guard page below, so that an overflow faults at
// once. AddressSanitizer is told of every switch; ThreadSanitizer is the runner's concern.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(KIMI_SIMT_UCONTEXT)
#define KIMI_SIMT_UCONTEXT 1
#endif

#if defined(KIMI_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  using Entry = void (*)(void* argument);  // must never return

  /// Adopts the stack of the calling thread.
  Fiber();
  /// Makes a suspended fiber that calls `entry(argument)` when it is switched to for the first
  /// time.
  Fiber(Entry entry, void* argument, size_t stack_bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Suspends `from`, which must be the running fiber, and resumes `to`. Returns when something
  /// resumes `from`.
  static void switch_to(Fiber& from, Fiber& to);

 private:
  static void trampoline();
  static void after_switch(Fiber& self);

#if defined(KIMI_SIMT_UCONTEXT)
  ucontext_t context_{};
#else
  void* stack_pointer_ = nullptr;
#endif
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  char* mapping_ = nullptr;  // the guard page, then the stack
  size_t mapping_bytes_ = 0;
  const void* stack_bottom_ = nullptr;
  size_t stack_bytes_ = 0;
  void* asan_fake_stack_ = nullptr;
};

}  // namespace simt
