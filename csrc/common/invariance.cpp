// SPDX-License-Identifier: MIT
#include "common/invariance.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace kimi {
namespace {

// Who asks for equal bits by a word that is not understood gets them.
bool initial() {
  const char* wanted = std::getenv("KIMI_OPS_BATCH_INVARIANT");
  if (!wanted || !*wanted || std::strcmp(wanted, "0") == 0) return false;
  if (std::strcmp(wanted, "1") != 0)
    std::fprintf(stderr, "kimi_ops: KIMI_OPS_BATCH_INVARIANT=%s: expected 0 or 1; taken as 1\n",
                 wanted);
  return true;
}

std::atomic<bool>& state() {
  static std::atomic<bool> value{initial()};
  return value;
}

}  // namespace

bool batch_invariant() { return state().load(std::memory_order_relaxed); }
void set_batch_invariant(bool wanted) { state().store(wanted, std::memory_order_relaxed); }

}  // namespace kimi
