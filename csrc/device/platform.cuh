// SPDX-License-Identifier: MIT
//
// What every kernel file stands on: CUDA itself, or the host runner's stand-in for it where
// KIMI_HOST_SIMT is defined; and shared memory, which C++ has no word for.
//
//   KIMI_SHARED(float, tile);               the launch's dynamic shared memory as a float*,
//                                           1024-byte aligned
//   KIMI_STATIC_SHARED(int32_t, sums, 64);  an array of the block's own
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(KIMI_HOST_SIMT)
#include "simt.h"

#define KIMI_SHARED(T, name) T* name = static_cast<T*>(::simt::detail::dynamic_shared())
#define KIMI_STATIC_SHARED(T, name, n) \
  static const char name##_site = 0;   \
  T(&name)                             \
  [n] = *static_cast<T(*)[n]>(::simt::detail::static_shared(&name##_site, sizeof(T[n]), alignof(T)))

#else
#include <cuda_runtime.h>

#define KIMI_SHARED(T, name)                                             \
  extern __shared__ __align__(1024) unsigned char kimi_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(kimi_dynamic_shared)
#define KIMI_STATIC_SHARED(T, name, n) __shared__ T name[n]

#endif
