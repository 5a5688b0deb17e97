// SPDX-License-Identifier: MIT
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

// The fiber being switched from and to on this OS thread: what a fresh fiber finds when it starts
// to run.
thread_local Fiber* t_from = nullptr;
thread_local Fiber* t_to = nullptr;

}  // namespace

#if !defined(KIMI_SIMT_UCONTEXT)
// void kimi_simt_switch(void** save_stack_pointer, void* load_stack_pointer), System V calling
// convention. The order of the pushes is known to the constructor below, which prepares a stack
// that looks as if it had been switched away from.
extern "C" void kimi_simt_switch(void** save_stack_pointer, void* load_stack_pointer);
__asm__(R"(
  .text
  .p2align 4
  .globl kimi_simt_switch
  .hidden kimi_simt_switch
  .type kimi_simt_switch, @function
kimi_simt_switch:
  .cfi_startproc
  endbr64
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
  .cfi_endproc
  .size kimi_simt_switch, .-kimi_simt_switch
)");
#endif

Fiber::Fiber() = default;

Fiber::Fiber(Entry entry, void* argument, size_t stack_bytes) : entry_(entry), argument_(argument) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  stack_bytes_ = (stack_bytes + page - 1) / page * page;
  mapping_bytes_ = stack_bytes_ + page;
  void* mapping = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  mprotect(mapping_, page, PROT_NONE);
  char* bottom = mapping_ + page;
  stack_bottom_ = bottom;
#if defined(KIMI_SIMT_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = bottom;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::trampoline, 0);
#else
  // From the top down: a zero where a caller's return address would be (it ends stack walks and
  // leaves the stack pointer at 8 mod 16, as after a call), the address to "return" to, and six
  // zero registers.
  void** top = reinterpret_cast<void**>(bottom + stack_bytes_);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::trampoline);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#endif
}

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  // Frames that never returned have left poison behind, and the next mapping may get this address.
  __asan_unpoison_memory_region(stack_bottom_, stack_bytes_);
#endif
  munmap(mapping_, mapping_bytes_);
}

void Fiber::after_switch([[maybe_unused]] Fiber& self) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.asan_fake_stack_, &t_from->stack_bottom_,
                                  &t_from->stack_bytes_);
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  t_from = &from;
  t_to = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.asan_fake_stack_, to.stack_bottom_, to.stack_bytes_);
#endif
#if defined(KIMI_SIMT_UCONTEXT)
  swapcontext(&from.context_, &to.context_);
#else
  kimi_simt_switch(&from.stack_pointer_, to.stack_pointer_);
#endif
  after_switch(from);
}

void Fiber::trampoline() {
  Fiber& self = *t_to;
  after_switch(self);
  self.entry_(self.argument_);
  std::abort();
}

}  // namespace simt
