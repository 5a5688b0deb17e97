// SPDX-License-Identifier: MIT
//
// wgmma (sm_90a): a warpgroup multiplies 64 rows of A by N columns of B, both in shared memory with
// 128-byte swizzle (tensor_map.cuh).
//
//   D[64, N] (+)= A B over one step of depth, 32 bytes: 16 values of 16 bits, 32 of 8
//
//   kDepth  rows of 128 bytes of depth, one for each outer value: one TMA box [outer][128 bytes],
//           four steps of depth
//   kOuter  rows of 64 outer values, one for each of 64 of depth: TMA boxes [64 depth][64 outer] of
//           8192 bytes, the next 64 outer values in the next one; four steps of depth
//
//   thread t of the warpgroup, w = t / 32, l = t % 32:
//   d[4 j + 2 h + i] = D[16 w + l / 4 + 8 h][8 j + 2 (l % 4) + i]
//
//   wgmma_fence(d); wgmma_fence(); wgmma(d, ..); ..; wgmma_commit(); ..; wgmma_wait<0>();
//   wgmma_fence(d);
//
// All 128 threads take part. From the first wgmma to the wait d belongs to the tensor core and the
// tiles are being read: touch neither. The wait is each warp's own, so a stage is free when all
// four have waited. FP8 sums keep fewer bits on the hardware than fp32 has; the model keeps all.
#pragma once

#include <type_traits>

#include "common/dtype.h"
#include "device/major.h"
#include "device/mbarrier.cuh"
#include "device/platform.cuh"
#include "device/wgmma_shapes.cuh"

#if defined(KIMI_HOST_SIMT)
#include <vector>
#endif

namespace kimi {

namespace detail {
/// Bytes from one step of depth to the next.
template <Major kMajor>
inline constexpr int kStepBytes = kMajor == Major::kDepth ? 32 : 16 * 128;
inline constexpr int kOuterBlockBytes = 64 * 128;
/// Every N that a kernel has asked for; the hardware takes any multiple of 8 up to 256.
constexpr bool is_wgmma_columns(int n) {
  return n >= 8 && n <= 256 && n % (n <= 64 ? 8 : n <= 128 ? 16 : 32) == 0;
}
}  // namespace detail

#if defined(KIMI_HOST_SIMT)

namespace detail {

/// The model's descriptor: the address, and in the top bits the major dimension plus one.
inline const char* address_of(uint64_t descriptor) {
  return reinterpret_cast<const char*>(descriptor << 2 >> 2);
}
/// to_float of every bit pattern: the model's inner loop looks them up, 32 threads each value.
template <class T>
const float* all_values() {
  using Bits = decltype(T::bits);
  static const std::vector<float> table = [] {
    std::vector<float> values(size_t{1} << 8 * sizeof(T));
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_float(T{static_cast<Bits>(i)});
    return values;
  }();
  return table.data();
}

// check_operand has looked at the memory; the sanitizers would at each of its values once more.
#define KIMI_MODEL __attribute__((no_sanitize("address", "undefined")))

/// The values of one step of depth in row or column `outer`.
template <class T, Major kMajor>
KIMI_MODEL void operand(const float* values, uint64_t descriptor, int outer, float* out) {
  constexpr int kSize = sizeof(T), kDepth = 32 / kSize;
  constexpr int kPiece = kMajor == Major::kDepth ? 16 / kSize : 1;  // side by side
  for (int k = 0; k < kDepth; k += kPiece) {
    const int offset = kMajor == Major::kDepth
                           ? outer * 128 + k * kSize
                           : outer / 64 * kOuterBlockBytes + k * 128 + outer % 64 * kSize;
    uintptr_t address = reinterpret_cast<uintptr_t>(address_of(descriptor) + offset);
    address ^= (address >> 7 & 7) << 4;
    decltype(T::bits) bits[kPiece];
    __builtin_memcpy(bits, reinterpret_cast<const void*>(address), sizeof bits);
    for (int i = 0; i < kPiece; ++i) out[k + i] = values[bits[i]];
  }
}

/// What one thread gets.
template <class T, int kN, Major kA, Major kB>
KIMI_MODEL void multiply(float* d, uint64_t a, uint64_t b, bool keep, int thread) {
  constexpr int kDepth = 32 / sizeof(T);
  const float* const values = all_values<T>();
  const int lane = thread % 32;
  float rows[2][kDepth], column[kDepth];
  for (int h = 0; h < 2; ++h)
    operand<T, kA>(values, a, thread / 32 % 4 * 16 + lane / 4 + 8 * h, rows[h]);
  for (int j = 0; j < kN / 8; ++j)
    for (int i = 0; i < 2; ++i) {
      operand<T, kB>(values, b, 8 * j + 2 * (lane % 4) + i, column);
      for (int h = 0; h < 2; ++h) {
        float& sum = d[4 * j + 2 * h + i];
        if (!keep) sum = 0.0f;
        for (int k = 0; k < kDepth; ++k) sum += rows[h][k] * column[k];
      }
    }
}
#undef KIMI_MODEL

/// Major dimension and shared memory of an operand of `outer` rows or columns; one lane looks
/// whether what threads wrote there was fenced.
template <Major kMajor>
void check_operand(uint64_t descriptor, int outer, const char* what, bool look) {
  if (descriptor >> 62 != static_cast<uint64_t>(kMajor) + 1)
    simt::fail(std::string(what) + ": the descriptor was made for the other major dimension");
  const char* const first = address_of(descriptor);
  const uintptr_t in_atom = reinterpret_cast<uintptr_t>(first) % 1024;
  if (in_atom % 32 != 0 || in_atom >= (kMajor == Major::kDepth ? 128 : 1))
    simt::fail(std::string(what) + ": the descriptor was advanced beyond its four steps, to " +
               simt::detail::shared_address(first));
  const auto check = [&](const char* from, int bytes) {
    simt::detail::check_shared(from, static_cast<size_t>(bytes), what);
    if (look) simt::check_fenced(from, static_cast<size_t>(bytes), what);
  };
  if (kMajor == Major::kDepth)
    check(first - reinterpret_cast<uintptr_t>(first) % 128, outer * 128);
  else
    for (int block = 0; block < outer; block += 64)
      check(first + block / 64 * kOuterBlockBytes, kStepBytes<kMajor>);
}

}  // namespace detail

template <Major kMajor>
uint64_t wgmma_descriptor(const void* tile) {
  const uint64_t address = reinterpret_cast<uintptr_t>(tile);
  if (address % 1024 != 0) simt::fail("wgmma_descriptor: the tile must be 1024-byte aligned");
  return address | (static_cast<uint64_t>(kMajor) + 1) << 62;
}
template <Major kMajor>
uint64_t wgmma_advance(uint64_t descriptor, int step) {
  return descriptor + static_cast<uint64_t>(step * detail::kStepBytes<kMajor>);
}

inline void wgmma_fence() { simt::wgmma_group().fenced = true; }
template <int kCount>
void wgmma_fence(float (&)[kCount]) {}
inline void wgmma_commit() { simt::wgmma_group().commit(); }
template <int kPending>
void wgmma_wait(std::source_location where = std::source_location::current()) {
  simt::wgmma_group().wait(kPending);
  __syncwarp(~0u, where);
}

template <class T, int kN, Major kA, Major kB>
void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool keep) {
  static_assert(detail::is_wgmma_columns(kN));
  static_assert(sizeof(T) == 2 || (kA == Major::kDepth && kB == Major::kDepth),
                "e4m3 has no transposed form");
  const simt::detail::Builtins& self = simt::detail::builtins("wgmma");
  const int thread = self.linear_thread;
  const unsigned threads = self.block_shape.x * self.block_shape.y * self.block_shape.z;
  if (static_cast<unsigned>(thread | 127) >= threads)
    simt::fail("wgmma: the warpgroup has fewer than 128 threads");
  if (!simt::wgmma_group().fenced)
    simt::fail("wgmma: no wgmma_fence since the thread began or last waited");
  detail::check_operand<kA>(a, 64, "wgmma: A", thread % 32 == 0);
  detail::check_operand<kB>(b, kN, "wgmma: B", thread % 32 == 0);
  simt::warpgroup_operation("wgmma", {{"type", kDtype<T>},
                                      {"N", kN},
                                      {"major of A", uint64_t(kA)},
                                      {"major of B", uint64_t(kB)},
                                      {"A", a},
                                      {"B", b},
                                      {"keep", uint64_t{keep}}});
  float* const sums = d;
  simt::wgmma_group().begin([=] { detail::multiply<T, kN, kA, kB>(sums, a, b, keep, thread); });
}

#else

/// Bits 0-13 address / 16, 16-29 leading and 32-45 stride byte offset / 16, 62-63 swizzle (1: 128
/// bytes). kDepth: stride is that of 8-row groups, leading is not used. kOuter: stride is that of
/// 8-depth groups, leading that of blocks of 64 outer values.
template <Major kMajor>
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile) {
  constexpr uint64_t kLeading = kMajor == Major::kDepth ? 1 : detail::kOuterBlockBytes / 16,
                     kStride = 1024 / 16;
  return static_cast<uint64_t>((detail::shared_u32(tile) & 0x3ffff) >> 4) | kLeading << 16 |
         kStride << 32 | uint64_t{1} << 62;
}

/// The descriptor of step `step` (0..3 for kDepth) of the tile's depth.
template <Major kMajor>
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, int step) {
  return descriptor + static_cast<uint64_t>(step * (detail::kStepBytes<kMajor> / 16));
}

/// wgmma.fence.sync.aligned: before the first wgmma, and after d was touched.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/// No instruction: the compiler moves no access to d across it. It knows nothing of the wait's
/// meaning, so this stands on both sides of a batch of wgmma.
template <int kCount>
__device__ __forceinline__ void wgmma_fence(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/// wgmma.commit_group.sync.aligned
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// wgmma.wait_group.sync.aligned: until all but the latest kPending groups are complete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// wgmma.mma_async.sync.aligned.m64nNk16 (bf16, fp16) or k32 (e4m3), sums in fp32. keep = false: d
/// = a b.
template <class T, int kN, Major kA, Major kB>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool keep) {
  static_assert(detail::is_wgmma_columns(kN), "KIMI_WGMMA_EVERY_SHAPE has no such shape");
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16> || std::is_same_v<T, e4m3>);
  static_assert(sizeof(T) == 2 || (kA == Major::kDepth && kB == Major::kDepth),
                "e4m3 has no transposed form");
  KIMI_WGMMA_EVERY_SHAPE
}

#endif

}  // namespace kimi
