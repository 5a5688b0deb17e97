// SPDX-License-Identifier: MIT
//
// What ThreadSanitizer is told: every CUDA thread is a thread of its own, and only barriers order
// them.
//
// The files of the runner are compiled without its instrumentation, since calls there do not return
// on the fiber that made them; KIMI_SIMT_TSAN says that the kernels are compiled with it.
#include "runner.h"

#if defined(KIMI_SIMT_TSAN)
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_write_range(void* address, unsigned long bytes);
}

namespace simt {
namespace detail {
namespace {
thread_local void* t_launching_thread = nullptr;
}

void* make_sanitizer_thread() { return __tsan_create_fiber(0); }
void destroy_sanitizer_thread(void* thread) { __tsan_destroy_fiber(thread); }
void* switch_sanitizer_thread(void* to) {
  void* from = __tsan_get_current_fiber();
  if (to == nullptr) to = t_launching_thread;
  if (to != from) __tsan_switch_to_fiber(to, __tsan_switch_to_fiber_no_sync);
  return from;
}
void release_as(const Thread& thread, const void* object) {
  void* const before = switch_sanitizer_thread(thread.sanitizer_thread);
  release(object);
  switch_sanitizer_thread(before);
}
void acquire_as(const Thread& thread, const void* object) {
  void* const before = switch_sanitizer_thread(thread.sanitizer_thread);
  acquire(object);
  switch_sanitizer_thread(before);
}
void ignore_accesses(bool ignore) {
  if (ignore) {
    t_launching_thread = __tsan_get_current_fiber();
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  } else {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
}

}  // namespace detail

InsideModel::InsideModel()
    : kernel_thread_(detail::t_builtins == nullptr ? nullptr
                                                   : detail::switch_sanitizer_thread(nullptr)) {}
InsideModel::~InsideModel() {
  if (kernel_thread_ != nullptr) detail::switch_sanitizer_thread(kernel_thread_);
}
void release(const void* object) { __tsan_release(const_cast<void*>(object)); }
void acquire(const void* object) { __tsan_acquire(const_cast<void*>(object)); }
void sees_write(const void* address, size_t bytes) {
  __tsan_write_range(const_cast<void*>(address), bytes);
}

}  // namespace simt

#else

namespace simt {
namespace detail {
void* make_sanitizer_thread() { return nullptr; }
void destroy_sanitizer_thread(void*) {}
void* switch_sanitizer_thread(void*) { return nullptr; }
void release_as(const Thread&, const void*) {}
void acquire_as(const Thread&, const void*) {}
void ignore_accesses(bool) {}
}  // namespace detail

InsideModel::InsideModel() : kernel_thread_(nullptr) {}
InsideModel::~InsideModel() = default;
void release(const void*) {}
void acquire(const void*) {}
void sees_write(const void*, size_t) {}

}  // namespace simt

#endif
