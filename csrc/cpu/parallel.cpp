// SPDX-License-Identifier: MIT
#include "cpu/parallel.h"

#include <system_error>
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace kimi::cpu {
namespace {

thread_local int chosen_threads = 0;
thread_local bool forked = false;
#if !defined(_WIN32)
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

int num_threads() { return chosen_threads > 0 ? chosen_threads : omp_get_max_threads(); }
void set_num_threads(int n) { chosen_threads = n; }
bool detail::is_forked() { return forked; }

void detail::on_new_thread(void (*body)(const void*), const void* of) {
#if !defined(_WIN32)
  struct Work {
    void (*body)(const void*);
    const void* of;
  } work = {body, of};
  pthread_t thread;
  const auto start = [](void* all) -> void* {
    static_cast<Work*>(all)->body(static_cast<Work*>(all)->of);
    return nullptr;
  };
  if (const int error = pthread_create(&thread, nullptr, start, &work))
    throw std::system_error(error, std::generic_category(),
                            "expected one more thread in a process that was forked; raise the "
                            "limit of processes (ulimit -u)");
  pthread_join(thread, nullptr);
#endif
}

}  // namespace kimi::cpu
