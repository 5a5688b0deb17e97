// SPDX-License-Identifier: MIT
// What an op says of a device that this build, or the op, has no kernels for.
#pragma once

#include "common/status.h"

// KIMI_CUDA(op, call): the call in a build with CUDA kernels, else the error that says so.
#if defined(KIMI_OPS_CUDA)
#define KIMI_CUDA(op, call) (call)
#else
#define KIMI_CUDA(op, call) ::kimi::no_cuda(op)
#endif

namespace kimi {

inline Status no_cuda(const char* op) {
  return error(KIMI_UNSUPPORTED, op,
               ": device: expected cpu, got cuda: this build has no CUDA kernels; rebuild with "
               "nvcc on the PATH and KIMI_OPS_CUDA=on");
}

// For ops without CUDA kernels in any build.
inline Status cpu_only(const char* op, kimi_device device) {
  if (device == KIMI_DEVICE_CPU) return Status::ok();
  return error(KIMI_UNSUPPORTED, op,
               ": device: expected cpu, got cuda: there is no CUDA kernel of this op yet; call "
               "kimi_ops.reference, which is plain torch");
}

}  // namespace kimi
