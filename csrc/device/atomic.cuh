// SPDX-License-Identifier: MIT
//
// Relaxed integer atomics, in shared or global memory. There is none on floats: their result would
// depend on the order of arrival, and every op of this project gives the same bits run after run.
#pragma once

#include "device/platform.cuh"

namespace kimi {

/// atom.add.s32 (red.add.s32 where the old value is not used). Signed and unsigned wrap alike.
__device__ inline int32_t atomic_add(int32_t* address, int32_t value) {
  return atomicAdd(address, value);
}
__device__ inline uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return atomicAdd(address, value);
}

/// atom.max.s32
__device__ inline int32_t atomic_max(int32_t* address, int32_t value) {
  return atomicMax(address, value);
}

/// atom.min.u32
__device__ inline uint32_t atomic_min(uint32_t* address, uint32_t value) {
  return atomicMin(address, value);
}

/// atom.or.b32
__device__ inline uint32_t atomic_or(uint32_t* address, uint32_t value) {
  return atomicOr(address, value);
}

/// atom.cas.b32: stores `value` where `expected` stood; the old value.
__device__ inline uint32_t atomic_cas(uint32_t* address, uint32_t expected, uint32_t value) {
  return atomicCAS(address, expected, value);
}

}  // namespace kimi
