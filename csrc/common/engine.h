// SPDX-License-Identifier: MIT
// Choice of an op's engine: on a CPU by instruction set at run time, on CUDA by what was built.
#pragma once

#include "common/status.h"
#include "cpu/features.h"

// KIMI_X86(engine): the engine's address where its file is part of the build, else nullptr.
#if defined(KIMI_OPS_X86)
#define KIMI_X86(engine) (&(engine))
#else
#define KIMI_X86(engine) nullptr
#endif

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

template <class Engine>
struct CpuEngines {
  // portable, avx2, avx512, avx512_bf16, amx; nullptr: the next weaker one serves
  const Engine* by_isa[5];

  kimi_isa isa() const {
    int isa = cpu::current_isa();
    while (isa > KIMI_ISA_PORTABLE && !by_isa[isa]) --isa;
    return kimi_isa(isa);
  }
  const Engine& best() const { return *by_isa[isa()]; }
};

}  // namespace kimi
