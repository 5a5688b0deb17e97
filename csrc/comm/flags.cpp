// SPDX-License-Identifier: MIT
#include "comm/flags.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <ctime>

namespace kimi::comm {

namespace {

// The lower half of the word, which is what the kernel compares. Without FUTEX_PRIVATE_FLAG the
// kernel tells words apart by page of memory and not by address, so that processes that have
// mapped the same memory at different places mean the same one.
long futex(const Machine::Word& word, int operation, uint32_t value, const timespec* timeout) {
  const auto* halves = reinterpret_cast<const uint32_t*>(&word);
  return syscall(SYS_futex, halves + (std::endian::native == std::endian::big ? 1 : 0), operation,
                 value, timeout, nullptr, 0);
}

}  // namespace

void Machine::pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void Machine::yield() { sched_yield(); }

int64_t Machine::now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

bool Machine::sleep(const Word& word, uint32_t seen, int64_t ns) {
  const timespec timeout{time_t(ns / 1'000'000'000), long(ns % 1'000'000'000)};
  return futex(word, FUTEX_WAIT, seen, &timeout) == 0 || errno != ETIMEDOUT;
}

void Machine::wake(const Word& word) { futex(word, FUTEX_WAKE, INT_MAX, nullptr); }

}  // namespace kimi::comm
#endif
