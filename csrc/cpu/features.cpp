// SPDX-License-Identifier: MIT
#include "cpu/features.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace kimi::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

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

}  // namespace kimi::cpu
