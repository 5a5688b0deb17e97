// SPDX-License-Identifier: MIT
//
// The CUDA C++ names that kernels may use without a wrapper, for the host runner: qualifiers,
// vector types, indices, barriers, warp operations, atomics, rounding intrinsics. What is missing
// here, such as __activemask, is missing on purpose.
#pragma once

#include <cmath>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::simt::detail::builtins("threadIdx").thread_index)
#define blockIdx (::simt::detail::builtins("blockIdx").block_index)
#define blockDim (::simt::detail::builtins("blockDim").block_shape)
#define gridDim (::simt::detail::builtins("gridDim").grid_shape)
inline constexpr int warpSize = 32;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace simt::detail {

template <class T>
uint64_t pack(T value) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "32 or 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// What `lane` reads from lane `source`, which the mask must name.
uint64_t shuffled(const WarpSlots& slots, int lane, int source);

using Where = std::source_location;
inline uint32_t shuffle_argument(int lane_or_delta, int width) {
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width)))
    fail("shuffle: width must be a power of two up to 32, got " + std::to_string(width));
  return static_cast<uint32_t>(lane_or_delta & 0xff) | static_cast<uint32_t>(width) << 8;
}
inline int shuffle_offset(uint32_t argument) { return static_cast<int>(argument & 0xff); }
inline int shuffle_width(uint32_t argument) { return static_cast<int>(argument >> 8); }

template <class T, class Combine>
T reduce(const char* name, uint32_t mask, T value, Combine, Where where) {
  const Resolve resolve = [](const WarpSlots& slots, int) {
    int lane = std::countr_zero(slots.mask);
    T result = unpack<T>(slots.value[lane]);
    for (++lane; lane < 32; ++lane)
      if (slots.mask >> lane & 1) result = Combine{}(result, unpack<T>(slots.value[lane]));
    return pack(result);
  };
  return unpack<T>(warp_operation(name, resolve, mask, pack(value), 0, where));
}

}  // namespace simt::detail

// ---- barriers -----------------------------------------------------------------------------------

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  simt::detail::block_barrier("__syncthreads", 0, 0, false, where);
}
inline int __syncthreads_count(int predicate,
                               std::source_location where = std::source_location::current()) {
  return simt::detail::block_barrier("__syncthreads_count", 0, 0, predicate != 0, where);
}
inline int __syncthreads_or(int predicate,
                            std::source_location where = std::source_location::current()) {
  return simt::detail::block_barrier("__syncthreads_or", 0, 0, predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate,
                             std::source_location where = std::source_location::current()) {
  return simt::detail::block_barrier("__syncthreads_and", 0, 0, predicate == 0, where) == 0;
}
void __syncwarp(uint32_t mask = ~0u, std::source_location where = std::source_location::current());

// ---- shuffles, votes, matches, reductions over the lanes of `mask` ------------------------------

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
              std::source_location where = std::source_location::current()) {
  const simt::detail::Resolve resolve = [](const simt::detail::WarpSlots& slots, int lane) {
    const int width = simt::detail::shuffle_width(slots.argument[lane]);
    const int offset = simt::detail::shuffle_offset(slots.argument[lane]) & (width - 1);
    return simt::detail::shuffled(slots, lane, (lane & ~(width - 1)) | offset);
  };
  return simt::detail::unpack<T>(
      simt::detail::warp_operation("__shfl_sync", resolve, mask, simt::detail::pack(value),
                                   simt::detail::shuffle_argument(source, width), where));
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 std::source_location where = std::source_location::current()) {
  const simt::detail::Resolve resolve = [](const simt::detail::WarpSlots& slots, int lane) {
    const int width = simt::detail::shuffle_width(slots.argument[lane]);
    const int source = lane - simt::detail::shuffle_offset(slots.argument[lane]);
    return simt::detail::shuffled(slots, lane, source < (lane & ~(width - 1)) ? lane : source);
  };
  return simt::detail::unpack<T>(simt::detail::warp_operation(
      "__shfl_up_sync", resolve, mask, simt::detail::pack(value),
      simt::detail::shuffle_argument(static_cast<int>(delta), width), where));
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   std::source_location where = std::source_location::current()) {
  const simt::detail::Resolve resolve = [](const simt::detail::WarpSlots& slots, int lane) {
    const int width = simt::detail::shuffle_width(slots.argument[lane]);
    const int source = lane + simt::detail::shuffle_offset(slots.argument[lane]);
    return simt::detail::shuffled(slots, lane, source > (lane | (width - 1)) ? lane : source);
  };
  return simt::detail::unpack<T>(simt::detail::warp_operation(
      "__shfl_down_sync", resolve, mask, simt::detail::pack(value),
      simt::detail::shuffle_argument(static_cast<int>(delta), width), where));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32,
                  std::source_location where = std::source_location::current()) {
  // A lane of a later segment is out of reach and gives the caller's own value.
  const simt::detail::Resolve resolve = [](const simt::detail::WarpSlots& slots, int lane) {
    const int width = simt::detail::shuffle_width(slots.argument[lane]);
    const int source = lane ^ simt::detail::shuffle_offset(slots.argument[lane]);
    return simt::detail::shuffled(slots, lane, source > (lane | (width - 1)) ? lane : source);
  };
  return simt::detail::unpack<T>(
      simt::detail::warp_operation("__shfl_xor_sync", resolve, mask, simt::detail::pack(value),
                                   simt::detail::shuffle_argument(lane_mask, width), where));
}

uint32_t __ballot_sync(uint32_t mask, int predicate,
                       std::source_location where = std::source_location::current());
int __any_sync(uint32_t mask, int predicate,
               std::source_location where = std::source_location::current());
int __all_sync(uint32_t mask, int predicate,
               std::source_location where = std::source_location::current());

template <class T>
uint32_t __match_any_sync(uint32_t mask, T value,
                          std::source_location where = std::source_location::current()) {
  const simt::detail::Resolve resolve = [](const simt::detail::WarpSlots& slots, int lane) {
    uint64_t equal = 0;
    for (int i = 0; i < 32; ++i)
      if (slots.mask >> i & 1) equal |= uint64_t{slots.value[i] == slots.value[lane]} << i;
    return equal;
  };
  return static_cast<uint32_t>(simt::detail::warp_operation("__match_any_sync", resolve, mask,
                                                            simt::detail::pack(value), 0, where));
}

#define KIMI_SIMT_REDUCE(name, type, expression)                                       \
  inline type name(uint32_t mask, type value,                                          \
                   std::source_location where = std::source_location::current()) {     \
    return simt::detail::reduce(                                                       \
        #name, mask, value, [](type a, type b) -> type { return expression; }, where); \
  }
KIMI_SIMT_REDUCE(__reduce_add_sync, uint32_t, a + b)
KIMI_SIMT_REDUCE(__reduce_add_sync, int32_t,
                 static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)))
KIMI_SIMT_REDUCE(__reduce_min_sync, uint32_t, b < a ? b : a)
KIMI_SIMT_REDUCE(__reduce_min_sync, int32_t, b < a ? b : a)
KIMI_SIMT_REDUCE(__reduce_max_sync, uint32_t, b > a ? b : a)
KIMI_SIMT_REDUCE(__reduce_max_sync, int32_t, b > a ? b : a)
KIMI_SIMT_REDUCE(__reduce_and_sync, uint32_t, a& b)
KIMI_SIMT_REDUCE(__reduce_or_sync, uint32_t, a | b)
KIMI_SIMT_REDUCE(__reduce_xor_sync, uint32_t, a ^ b)
#undef KIMI_SIMT_REDUCE

// ---- atomics: relaxed, on 32- and 64-bit integers; the old value is returned --------------------

namespace simt::detail {
template <class T>
concept AtomicInteger =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

template <class T, class Update>
T atomic_update(T* address, Update update) {
  preemption_point();
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  const T next = update(old);
  __atomic_store_n(address, next,
                   __ATOMIC_RELAXED);  // nothing runs between: fibers switch only where they wait
  if (next != old) notify_spinners();
  return old;
}
}  // namespace simt::detail

template <simt::detail::AtomicInteger T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  using Unsigned = std::make_unsigned_t<T>;
  return simt::detail::atomic_update(address, [=](T old) {
    return static_cast<T>(static_cast<Unsigned>(old) + static_cast<Unsigned>(value));
  });
}
template <simt::detail::AtomicInteger T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::detail::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <simt::detail::AtomicInteger T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return simt::detail::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <simt::detail::AtomicInteger T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return simt::detail::atomic_update(address, [=](T old) { return old | value; });
}
template <simt::detail::AtomicInteger T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::detail::atomic_update(address, [=](T) { return value; });
}
template <simt::detail::AtomicInteger T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return simt::detail::atomic_update(address, [=](T old) { return old == compare ? value : old; });
}

// To ThreadSanitizer a fence orders this thread with all that fenced before: more than it does.
void __threadfence();
inline void __threadfence_block() { __threadfence(); }

// ---- bits ---------------------------------------------------------------------------------------

inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline uint32_t __brev(uint32_t x) {
  uint32_t reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
