// SPDX-License-Identifier: MIT
//
// 16-byte memory accesses, and 8 values of any type at a time as fp32. The host models refuse a
// misaligned address, on which the hardware faults.
#pragma once

#include <cstring>

#include "device/convert.cuh"
#include "device/platform.cuh"

namespace kimi {

/// N values that travel together: loads and stores of a Vec are single instructions up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0,
                "a power of two of values, 16 bytes at most");
  T values[N];
  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

#if defined(KIMI_HOST_SIMT)

namespace detail {
inline void check_alignment(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    simt::fail(std::string(what) + ": the address must be a multiple of 16 bytes");
}
}  // namespace detail

inline uint4 load16(const void* address) {
  detail::check_alignment(address, "load16");
  return *static_cast<const uint4*>(address);
}
inline uint4 load16_streaming(const void* address) {
  simt::detail::check_global16(address, "load16_streaming");
  return *static_cast<const uint4*>(address);
}
inline uint4 load16_fresh(const void* address) {
  simt::detail::check_global16(address, "load16_fresh");
  return *static_cast<const uint4*>(address);
}
inline void store16(void* address, uint4 value) {
  detail::check_alignment(address, "store16");
  *static_cast<uint4*>(address) = value;
  simt::generic_write(address, 16);
}
inline void store16_streaming(void* address, uint4 value) {
  simt::detail::check_global16(address, "store16_streaming");
  *static_cast<uint4*>(address) = value;
}
inline void store16_evict_first(void* address, uint4 value) { store16_streaming(address, value); }

#else

/// ld.v4.u32 from any space.
__device__ inline uint4 load16(const void* address) { return *static_cast<const uint4*>(address); }

/// ld.global.nc.L1::no_allocate.v4.u32: global memory that this kernel does not write and reads
/// once.
__device__ inline uint4 load16_streaming(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(address)));
  return value;
}

/// ld.global.L1::no_allocate.v4.u32: the same for a kernel that overlaps the one which writes it
/// (overlap.cuh).
__device__ inline uint4 load16_fresh(const void* address) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(address)));
  return value;
}

/// st.v4.u32 to any space.
__device__ inline void store16(void* address, uint4 value) {
  // as asm: the compiler would split a value that it saw put together from smaller ones
  asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

/// st.global.cs.v4.u32: global memory that is not read again soon.
__device__ inline void store16_streaming(void* address, uint4 value) {
  __stcs(static_cast<uint4*>(address), value);
}

/// st.global.L2::cache_hint with createpolicy.fractional.L2::evict_first: the first to leave L2.
__device__ inline void store16_evict_first(void* address, uint4 value) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(
                   __cvta_generic_to_global(address)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "l"(policy)
               : "memory");
}

#endif

/// 8 values of a row; beyond `count` they are 0 and are not touched. `wide`: 16 bytes divide the
/// address.
template <class T>
__device__ inline void load8(const T* from, float (&v)[8], int count, bool wide) {
  constexpr int kPerLoad = 16 / sizeof(T);
  if (wide && count == 8) {
#pragma unroll
    for (int i = 0; i < 8; i += kPerLoad) {
      const uint4 bits = load16(from + i);
      T values[kPerLoad];
      memcpy(values, &bits, sizeof bits);
#pragma unroll
      for (int k = 0; k < kPerLoad; ++k) v[i + k] = to_float(values[k]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < count ? to_float(from[i]) : 0.0f;
}

/// The same the other way.
template <class T>
__device__ inline void store8(T* to, const float (&v)[8], int count, bool wide) {
  if (wide && count == 8) {
    if constexpr (sizeof(T) == 2) {
      store16(to, {round_pair<T>(v[0], v[1]), round_pair<T>(v[2], v[3]), round_pair<T>(v[4], v[5]),
                   round_pair<T>(v[6], v[7])});
    } else {
      store16(to, {bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])});
      store16(to + 4, {bits_of(v[4]), bits_of(v[5]), bits_of(v[6]), bits_of(v[7])});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) to[i] = from_float<T>(v[i]);
}

}  // namespace kimi
