// SPDX-License-Identifier: MIT
//
// Kernel launches and memory operations on a stream, with errors as a Status.
#pragma once

#include "common/status.h"
#include "device/platform.cuh"

#if defined(KIMI_HOST_SIMT)
#include <cstring>
#endif

namespace kimi {

struct LaunchConfig {
  dim3 grid, block;
  size_t smem_bytes = 0;   // dynamic shared memory of a block
  void* stream = nullptr;  // a cudaStream_t
  bool cooperative =
      false;  // all blocks are resident at once, so that they may wait for each other
};

#if defined(KIMI_HOST_SIMT)

/// Runs the kernel to its end. Its mistakes are thrown as simt::Error.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  simt::launch(kernel, {config.grid, config.block, config.smem_bytes, config.cooperative},
               arguments...);
  return Status::ok();
}

inline Status memset_async(void* destination, int byte, size_t bytes, void* /*stream*/) {
  if (bytes > 0) std::memset(destination, byte, bytes);
  return Status::ok();
}

/// Blocks of the kernel that run at the same time on the whole device. Few on the host runner, so
/// that persistent kernels go round.
template <class... Parameters>
int resident_blocks(void (*)(Parameters...), int /*threads*/, size_t /*smem_bytes*/) {
  return 5;
}

#else

inline Status cuda_status(const char* what, cudaError_t code) {
  if (code == cudaSuccess) return Status::ok();
  (void)cudaGetLastError();  // it has been reported: the next call starts clean
  return error(KIMI_CUDA_ERROR, what, ": ", cudaGetErrorName(code), ": ", cudaGetErrorString(code));
}

/// cudaLaunchKernelEx: queues the kernel; reports what the runtime refuses, not what the kernel
/// does later.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;  // more dynamic shared memory must be opted into
  if (config.smem_bytes > kWithoutAsking) {
    KIMI_RETURN_IF_ERROR(
        cuda_status("launch: shared memory",
                    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(config.smem_bytes))));
  }
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t cuda{};
  cuda.gridDim = config.grid;
  cuda.blockDim = config.block;
  cuda.dynamicSmemBytes = config.smem_bytes;
  cuda.stream = static_cast<cudaStream_t>(config.stream);
  cuda.attrs = &cooperative;
  cuda.numAttrs = config.cooperative ? 1 : 0;
  return cuda_status("launch",
                     cudaLaunchKernelEx(&cuda, kernel, static_cast<Parameters>(arguments)...));
}

inline Status memset_async(void* destination, int byte, size_t bytes, void* stream) {
  if (bytes == 0) return Status::ok();
  return cuda_status("memset",
                     cudaMemsetAsync(destination, byte, bytes, static_cast<cudaStream_t>(stream)));
}

/// Blocks of the kernel that run at the same time on the whole current device; 1 where the runtime
/// cannot say (the launch then reports why).
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t smem_bytes) {
  int device = 0, multiprocessors = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) !=
          cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, smem_bytes) !=
          cudaSuccess)
    return 1;
  return blocks > 0 ? blocks * multiprocessors : 1;
}

#endif

}  // namespace kimi
