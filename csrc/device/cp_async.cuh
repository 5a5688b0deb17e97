// SPDX-License-Identifier: MIT
//
// cp.async: 16 bytes from global to shared memory that pass by the registers (sm_80 on).
//
//   copy copy ... commit | copy ... commit | ...     groups of copies, of the issuing thread alone
//   wait<1>                                          all its groups but the last one have landed
//
// A wait is for the waiting thread's own copies; a block barrier after it shows them to the others.
// Or nobody waits: arrive() lets an mbarrier count the thread once its copies so far have landed;
// who waits there sees them, and lets wgmma see them by fence_async_shared.
#pragma once

#include "device/mbarrier.cuh"
#include "device/platform.cuh"

#if defined(KIMI_HOST_SIMT)
#include <unordered_map>
#include <vector>
#endif

namespace kimi {

#if defined(KIMI_HOST_SIMT)

// Copies land at the latest moment, in the wait that asks for them, so that a missing wait shows;
// with every other four seeds at the earliest, so that a copy into memory still in use shows.
namespace detail {
struct AsyncCopy {
  void* shared;
  const void* global;
  bool valid;
};
using AsyncGroups = std::vector<std::vector<AsyncCopy>>;  // oldest first; the last is still open

/// Of the running CUDA thread. What a thread leaves behind when it exits never lands.
class ThreadsGroups {
 public:
  ThreadsGroups() : serial_(simt::detail::builtins("cp_async").serial) {
    AsyncGroups& groups = all()[serial_];
    if (groups.empty()) groups.resize(1);
  }
  // Forgets old groups without copies: no wait can tell.
  ~ThreadsGroups() {
    AsyncGroups& groups = all()[serial_];
    while (groups.size() > 1 && groups.front().empty()) groups.erase(groups.begin());
    if (groups.size() == 1 && groups.front().empty()) all().erase(serial_);
  }
  AsyncGroups* operator->() const { return &all()[serial_]; }
  AsyncGroups& operator*() const { return all()[serial_]; }

 private:
  static std::unordered_map<uint64_t, AsyncGroups>& all() {
    thread_local std::unordered_map<uint64_t, AsyncGroups> groups;
    return groups;
  }
  uint64_t serial_;
};
inline void land(const AsyncCopy& copy) {
  if (copy.valid)
    std::memcpy(copy.shared, copy.global, 16);
  else
    std::memset(copy.shared, 0, 16);
}
}  // namespace detail

inline void cp_async16(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0)
    simt::fail("cp_async16: both addresses must be multiples of 16 bytes");
  simt::detail::check_shared(shared, 16, "cp_async16");
  if (valid) simt::detail::check_global16(global, "cp_async16");
  const detail::AsyncCopy copy{shared, global, valid};
  if (simt::settings().seed / 4 % 2 != 0) return detail::land(copy);
  const simt::InsideModel inside;
  detail::ThreadsGroups()->back().push_back(copy);
}
inline void cp_async_arrive(MBarrier& b) {
  detail::check_own(b, "cp_async_arrive");
  std::vector<detail::AsyncCopy> due;
  {
    const simt::InsideModel inside;
    const detail::ThreadsGroups groups;
    for (const auto& group : *groups) due.insert(due.end(), group.begin(), group.end());
    groups->assign(1, {});
  }
  simt::complete_later(simt::cluster_rank(), [due = std::move(due), &b] {
    for (const detail::AsyncCopy& copy : due) {
      detail::land(copy);
      simt::generic_write(copy.shared, 16);
    }
    detail::count_arrival(b);
  });
}
inline void cp_async_commit() {
  const simt::InsideModel inside;
  detail::ThreadsGroups()->emplace_back();
}
template <int kPending>
inline void cp_async_wait() {
  std::vector<detail::AsyncCopy> due;
  {
    const simt::InsideModel inside;
    const detail::ThreadsGroups groups;
    while (groups->size() > kPending + 1) {
      due.insert(due.end(), groups->front().begin(), groups->front().end());
      groups->erase(groups->begin());
    }
  }
  for (const detail::AsyncCopy& copy : due) detail::land(copy);
}

#else

/// cp.async.cg.shared.global.L2::128B: past L1, and L2 fetches whole lines. `valid` false: 16 bytes
/// of zero, and the address is not read.
__device__ inline void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

/// cp.async.mbarrier.arrive.noinc.shared::cta.b64: one of the arrivals that the barrier expects,
/// when all copies of this thread so far have landed.
__device__ inline void cp_async_arrive(MBarrier& b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(detail::shared_u32(&b))
               : "memory");
}

/// cp.async.commit_group: the copies since the last one are a group, which may be empty.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// cp.async.wait_group: until all but the youngest `kPending` groups have landed.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace kimi
