// SPDX-License-Identifier: MIT
#include "cpu/features.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "cpu/parallel.h"

namespace kimi::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
thread_local int chosen_threads = 0;
thread_local bool forked = false;
#if !defined(_WIN32)
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// An environment variable cannot return a status: a wrong value is said once and not obeyed.
kimi_isa initial_isa() {
  const kimi_isa best = detected_isa();
  const char* wanted = std::getenv("KIMI_OPS_ISA");
  if (!wanted || !*wanted) return best;
  for (int i = KIMI_ISA_PORTABLE; i <= KIMI_ISA_AMX; ++i) {
    if (std::strcmp(wanted, kNames[i]) != 0) continue;
    if (i <= best) return kimi_isa(i);
    std::fprintf(stderr, "kimi_ops: KIMI_OPS_ISA=%s: this machine offers up to %s, which is used\n",
                 wanted, kNames[best]);
    return best;
  }
  std::fprintf(stderr,
               "kimi_ops: KIMI_OPS_ISA=%s: expected portable, avx2, avx512, avx512_bf16 or amx; "
               "using %s\n",
               wanted, kNames[best]);
  return best;
}

std::atomic<int>& isa() {
  static std::atomic<int> value{initial_isa()};
  return value;
}

}  // namespace

kimi_isa detected_isa() {
#if defined(KIMI_OPS_X86)
  static const kimi_isa best = probe_x86();
  return best;
#else
  return KIMI_ISA_PORTABLE;
#endif
}

kimi_isa current_isa() { return kimi_isa(isa().load(std::memory_order_relaxed)); }

Status set_isa(kimi_isa wanted) {
  if (wanted < KIMI_ISA_PORTABLE || wanted > detected_isa())
    return invalid("set_isa: isa: expected portable to ", isa_name(detected_isa()),
                   " (the best of this machine), got ", isa_name(wanted));
  isa().store(wanted, std::memory_order_relaxed);
  return Status::ok();
}

const char* isa_name(kimi_isa value) {
  return value >= KIMI_ISA_PORTABLE && value <= KIMI_ISA_AMX ? kNames[value] : "unknown";
}

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
