// SPDX-License-Identifier: MIT
//
// mbarrier: a barrier in shared memory that counts arrivals and, from sm_90 on, bytes of
// asynchronous copies.
//
//   phase n is complete when `arrivals` threads have arrived in it and all bytes announced by
//   expect_tx have come; then phase n + 1 begins by itself. wait(parity) returns when the phase of
//   that parity is complete: a new barrier is in phase 0, so wait(1) returns at once and wait(0)
//   when the first phase is complete.
//
// Waits may run ahead or behind by less than one phase: a parity tells two phases apart, not three.
#pragma once

#include "device/platform.cuh"

namespace kimi {

#if defined(KIMI_HOST_SIMT)

/// Eight bytes, as on the device. The model refuses what the PTX ISA leaves undefined.
struct MBarrier {
  // In `state`; fresh shared memory holds 3.
  static constexpr unsigned kAlive = 1, kUnfenced = 2;  // initialised, with and without a fence
  static constexpr int64_t kMostBytes = (1 << 20) - 1;  // pending, or come before their expect_tx
  uint64_t expected : 20, pending : 20, state : 2, phase : 1;
  int64_t bytes : 21;
};
static_assert(sizeof(MBarrier) == 8);

namespace detail {
inline std::string name_of(const MBarrier& b) {
  return "mbarrier at " + simt::detail::shared_address(&b);
}
inline void check_alive(const MBarrier& b, const char* what) {
  if (b.state != MBarrier::kAlive && b.state != MBarrier::kUnfenced)
    simt::fail(std::string(what) + ": " + name_of(b) + " has not been initialised");
}
/// For those that are no thread of the block: TMA, and threads of other blocks.
inline void check_fenced(const MBarrier& b, const char* what) {
  const simt::InsideModel inside;
  check_alive(b, what);
  if (b.state == MBarrier::kUnfenced)
    simt::fail(std::string(what) + ": " + name_of(b) +
               ": no mbarrier_fence_init since it was initialised");
}
/// All but mbarrier_arrive_in reach the block's own barriers alone.
inline void check_own(const MBarrier& b, const char* what) {
  const simt::InsideModel inside;
  simt::detail::check_shared(&b, sizeof b, what);
  check_alive(b, what);
}
/// What memory is ordered by: another address for the other phase.
inline const void* meeting(const MBarrier& b, uint32_t phase) {
  return reinterpret_cast<const char*>(&b) + (phase & 1);
}
inline void publish(const MBarrier& b) {
  uint32_t phase;
  {
    const simt::InsideModel inside;
    phase = b.phase;
  }
  simt::release(meeting(b, phase));
}
inline void settle(MBarrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.expected;
  }
  simt::notify_spinners();
}
inline void add_bytes(MBarrier& b, int64_t bytes, const char* what) {
  const int64_t pending = b.bytes + bytes;
  if (pending > MBarrier::kMostBytes || pending < -MBarrier::kMostBytes)
    simt::fail(std::string(what) + ": " + name_of(b) +
               ": expected -(2^20-1) to 2^20-1 bytes to be pending, got " +
               std::to_string(pending));
  b.bytes = pending & ((1 << 21) - 1);
}
inline void count_arrival(MBarrier& b) {
  publish(b);
  const simt::InsideModel inside;
  check_alive(b, "mbarrier_arrive");
  if (b.pending == 0)
    simt::fail("mbarrier_arrive: over-arrival at " + name_of(b) + ": all " +
               std::to_string(b.expected) + " arrivals of phase " + std::to_string(b.phase) +
               " have come, " + std::to_string(b.bytes) + " bytes have not");
  b.pending = (b.pending - 1) & 0xfffff;
  settle(b);
}
inline void arrive(MBarrier& b) {
  simt::preemption_point();
  count_arrival(b);
}
/// What an asynchronous copy does when `bytes` of it have landed; models of copies call it.
inline void complete_tx(MBarrier& b, uint32_t bytes) {
  publish(b);
  const simt::InsideModel inside;
  check_alive(b, "mbarrier_complete_tx");
  add_bytes(b, -static_cast<int64_t>(bytes), "mbarrier_complete_tx");
  settle(b);
}
}  // namespace detail

inline void mbarrier_init(MBarrier& b, uint32_t arrivals) {
  const simt::InsideModel inside;
  if (arrivals < 1 || arrivals >= 1u << 20)
    simt::fail("mbarrier_init: arrivals: expected 1 to 2^20-1, got " + std::to_string(arrivals));
  if (reinterpret_cast<uintptr_t>(&b) % 8 != 0)
    simt::fail("mbarrier_init: the barrier must be 8-byte aligned");
  simt::detail::check_shared(&b, sizeof b, "mbarrier_init");
  if (b.state == MBarrier::kAlive || b.state == MBarrier::kUnfenced)
    simt::fail("mbarrier_init: " + detail::name_of(b) + " has been initialised before");
  b.expected = b.pending = arrivals & 0xfffff;
  b.state = MBarrier::kUnfenced;
  b.phase = 0;
  b.bytes = 0;
  simt::unfenced_barriers().push_back(&b);
}
inline void mbarrier_fence_init() {
  const simt::InsideModel inside;
  for (void* b : simt::unfenced_barriers()) static_cast<MBarrier*>(b)->state = MBarrier::kAlive;
  simt::unfenced_barriers().clear();
}
inline void mbarrier_expect_tx(MBarrier& b, uint32_t bytes) {
  detail::check_own(b, "mbarrier_expect_tx");
  const simt::InsideModel inside;
  detail::add_bytes(b, bytes, "mbarrier_expect_tx");
}
inline void mbarrier_arrive(MBarrier& b) {
  detail::check_own(b, "mbarrier_arrive");
  detail::arrive(b);
}
inline void mbarrier_arrive_expect_tx(MBarrier& b, uint32_t bytes) {
  mbarrier_expect_tx(b, bytes);
  mbarrier_arrive(b);
}
inline void mbarrier_complete_tx(MBarrier& b, uint32_t bytes) {
  detail::check_own(b, "mbarrier_complete_tx");
  detail::complete_tx(b, bytes);
}
inline bool mbarrier_try_wait(MBarrier& b, uint32_t parity) {
  bool complete = false;
  {
    const simt::InsideModel inside;
    detail::check_own(b, "mbarrier_try_wait");
    complete = b.phase != (parity & 1);
  }
  if (complete) simt::acquire(detail::meeting(b, parity));
  return complete;
}
inline bool mbarrier_test(MBarrier& b, uint32_t parity) { return mbarrier_try_wait(b, parity); }
inline void mbarrier_wait(MBarrier& b, uint32_t parity,
                          std::source_location where = std::source_location::current()) {
  simt::preemption_point();
  simt::spin_until([&] { return mbarrier_try_wait(b, parity); },
                   [&] {
                     return detail::name_of(b) + ", phase of parity " + std::to_string(parity & 1) +
                            " to complete (it is in phase " + std::to_string(b.phase) + ", " +
                            std::to_string(b.pending) + " of " + std::to_string(b.expected) +
                            " arrivals and " + std::to_string(b.bytes) + " bytes pending)";
                   },
                   where);
}

#else

using MBarrier = uint64_t;

namespace detail {
__device__ inline uint32_t shared_u32(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
}  // namespace detail

/// mbarrier.init.shared::cta.b64. One thread, once; then mbarrier_fence_init and a block barrier.
__device__ inline void mbarrier_init(MBarrier& b, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_u32(&b)),
               "r"(arrivals)
               : "memory");
}

/// mbarrier.arrive.shared::cta.b64: release, one arrival.
__device__ inline void mbarrier_arrive(MBarrier& b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(detail::shared_u32(&b)) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/// fence.mbarrier_init.release.cluster: makes the initialisation visible to asynchronous copies.
__device__ inline void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// mbarrier.expect_tx.relaxed.cta.shared::cta.b64: the phase also waits for `bytes` of copies.
__device__ inline void mbarrier_expect_tx(MBarrier& b, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_u32(&b)),
      "r"(bytes)
      : "memory");
}

/// mbarrier.arrive.expect_tx.shared::cta.b64: both at once.
__device__ inline void mbarrier_arrive_expect_tx(MBarrier& b, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(detail::shared_u32(&b)),
      "r"(bytes)
      : "memory");
}

/// mbarrier.complete_tx.relaxed.cta.shared::cta.b64: what an asynchronous copy does; for tests.
__device__ inline void mbarrier_complete_tx(MBarrier& b, uint32_t bytes) {
  asm volatile(
      "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_u32(&b)),
      "r"(bytes)
      : "memory");
}

/// mbarrier.try_wait.parity.shared::cta.b64: acquire; may suspend for a while; whether the phase is
/// complete.
__device__ inline bool mbarrier_try_wait(MBarrier& b, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(complete)
      : "r"(detail::shared_u32(&b)), "r"(parity)
      : "memory");
  return complete != 0;
}

/// mbarrier.test_wait.parity.shared::cta.b64: the same at once.
__device__ inline bool mbarrier_test(MBarrier& b, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(complete)
      : "r"(detail::shared_u32(&b)), "r"(parity)
      : "memory");
  return complete != 0;
}

/// Waits until the phase of that parity is complete.
__device__ inline void mbarrier_wait(MBarrier& b, uint32_t parity) {
  while (!mbarrier_try_wait(b, parity)) {
  }
}
#endif

#endif

}  // namespace kimi
