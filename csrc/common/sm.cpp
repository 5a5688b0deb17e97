// SPDX-License-Identifier: MIT
#include "common/sm.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace kimi {
namespace {

// An environment variable cannot return a status: a wrong value is said once and not obeyed.
int initial_sm() {
  const char* wanted = std::getenv("KIMI_OPS_SM");
  if (!wanted || !*wanted) return 0;
  char* end = nullptr;
  const long sm = std::strtol(wanted, &end, 10);
  if (*end == '\0' && sm >= kMinSm && sm < 1000) return int(sm);
  std::fprintf(stderr, "kimi_ops: KIMI_OPS_SM=%s: expected 80, 90 or the like; no limit is set\n",
               wanted);
  return 0;
}

bool initial_overlap() {
  const char* wanted = std::getenv("KIMI_OPS_OVERLAP");
  if (!wanted || !*wanted || std::strcmp(wanted, "1") == 0) return true;
  if (std::strcmp(wanted, "0") == 0) return false;
  std::fprintf(stderr, "kimi_ops: KIMI_OPS_OVERLAP=%s: expected 0 or 1; kernels overlap\n", wanted);
  return true;
}

std::atomic<int>& limit() {
  static std::atomic<int> value{initial_sm()};
  return value;
}

}  // namespace

bool overlap_allowed() {
  static const bool allowed = initial_overlap();
  return allowed;
}

int max_sm() { return limit().load(std::memory_order_relaxed); }

Status set_max_sm(int sm) {
  if (sm != 0 && sm < kMinSm)
    return invalid("set_max_sm: sm: expected 0 (no limit) or ", kMinSm, " and above, got ", sm);
  limit().store(sm, std::memory_order_relaxed);
  return Status::ok();
}

}  // namespace kimi
