// SPDX-License-Identifier: MIT
//
// Memory that other GPUs write and read: flags at system scope, and rows.
//
//   writer   all threads store rows; __syncthreads; one thread store_release_sys(flag)
//   reader   one thread load_acquire_sys(flag) until it has come; __syncthreads; all threads load
//
// A release is cumulative: it orders what its thread did and what it has seen through barriers and
// acquires before it, so one release serves a block's rows, and with atomic_add_acq_rel between
// blocks those of a grid. Rows are generic loads and stores: no proxy fence is needed, since TMA
// moves none of them. They are never loaded by the non-coherent path, which may keep
// what a peer has overwritten.
//
// KIMI_OPS_JITTER is a build that waits for up to 8 us before each flag, now this long and now that:
// what is not ordered comes apart more often there.
#pragma once

#include "device/platform.cuh"
#include "device/vec.cuh"

namespace kimi {

#if defined(KIMI_HOST_SIMT)

namespace detail {
/// Nanoseconds of the host's clock: it goes on when it is looked at.
inline uint64_t& peer_clock() {
  static uint64_t now = 0;
  return now;
}
template <class T>
T read_flag(const T* flag) {
  const simt::InsideModel inside;
  return *flag;
}
template <class T>
void write_flag(T* flag, T value) {
  {
    const simt::InsideModel inside;
    *flag = value;
  }
  simt::notify_spinners();
}
}  // namespace detail

inline void store_release_sys(uint64_t* flag, uint64_t value) {
  simt::preemption_point();
  simt::release(flag);
  detail::write_flag(flag, value);
}
inline void store_relaxed_sys(uint64_t* flag, uint64_t value) {
  simt::preemption_point();
  detail::write_flag(flag, value);
}
inline uint64_t load_acquire_sys(const uint64_t* flag) {
  const uint64_t value = detail::read_flag(flag);
  simt::acquire(flag);
  return value;
}
inline uint32_t atomic_add_acq_rel(uint32_t* counter, uint32_t value) {
  simt::preemption_point();
  simt::release(counter);
  const uint32_t old = detail::read_flag(counter);
  detail::write_flag(counter, old + value);
  simt::acquire(counter);
  return old;
}
inline void atomic_or_sys(uint64_t* word, uint64_t bits) {
  simt::preemption_point();
  detail::write_flag(word, detail::read_flag(word) | bits);
}
inline uint64_t global_nanoseconds() {
  const simt::InsideModel inside;
  return detail::peer_clock() += 1000;
}
template <class Ready>
bool wait_until(Ready ready, uint64_t deadline,
                std::source_location where = std::source_location::current()) {
  simt::preemption_point();
  bool in_time = true;
  simt::spin_until([&] { return ready() || !(in_time = global_nanoseconds() < deadline); },
                   [] { return std::string("a flag of a peer"); }, where);
  return in_time;
}
inline uint4 load16_peer(const void* address) {
  simt::detail::check_global16(address, "load16_peer");
  return *static_cast<const uint4*>(address);
}

#else

namespace detail {
__device__ inline void jitter() {
#if defined(KIMI_OPS_JITTER)
  uint32_t clock;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(clock));
  asm volatile("nanosleep.u32 %0;" ::"r"((clock * 2654435761u) >> 19));  // below 2^13 ns
#endif
}
}  // namespace detail

/// st.release.sys.global.u64: all that this thread did and has seen before is there for who acquires
/// the value.
__device__ inline void store_release_sys(uint64_t* flag, uint64_t value) {
  detail::jitter();
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)),
               "l"(value)
               : "memory");
}

/// st.relaxed.sys.global.u64: whole, and ordered by nothing.
__device__ inline void store_relaxed_sys(uint64_t* flag, uint64_t value) {
  detail::jitter();
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)),
               "l"(value)
               : "memory");
}

/// ld.acquire.sys.global.u64
__device__ inline uint64_t load_acquire_sys(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];"
               : "=l"(value)
               : "l"(__cvta_generic_to_global(flag))
               : "memory");
  return value;
}

/// atom.acq_rel.gpu.global.add.u32, on this GPU's own memory: the old value. The last of several
/// blocks to come has acquired what the others released.
__device__ inline uint32_t atomic_add_acq_rel(uint32_t* counter, uint32_t value) {
  uint32_t old;
  detail::jitter();
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(counter)), "r"(value)
               : "memory");
  return old;
}

/// red.relaxed.sys.global.or.b64: the host may read the word while the kernel runs.
__device__ inline void atomic_or_sys(uint64_t* word, uint64_t bits) {
  asm volatile("red.relaxed.sys.global.or.b64 [%0], %1;" ::"l"(__cvta_generic_to_global(word)),
               "l"(bits)
               : "memory");
}

/// %globaltimer: nanoseconds, the same clock on all SMs; it moves in steps of up to a microsecond.
__device__ inline uint64_t global_nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

/// Calls ready() until it is true, or false once the clock has reached `deadline`.
template <class Ready>
__device__ bool wait_until(Ready ready, uint64_t deadline) {
  while (!ready()) {
    if (global_nanoseconds() >= deadline) return false;
    asm volatile("nanosleep.u32 32;");  // a poll takes the cache's bandwidth from the copies
  }
  return true;
}

/// ld.global.L1::no_allocate.v4.u32: read once, and coherent, unlike load16_streaming.
__device__ inline uint4 load16_peer(const void* address) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
}

#endif

}  // namespace kimi
