// SPDX-License-Identifier: MIT
//
// Kernel launches and memory operations on a stream, with errors as a Status.
#pragma once

#include "common/sm.h"
#include "common/status.h"
#include "device/platform.cuh"

#if defined(KIMI_HOST_SIMT)
#include <cstring>
#else
#include <compare>
#include <map>
#include <mutex>
#endif

namespace kimi {

struct LaunchConfig {
  dim3 grid, block;
  size_t smem_bytes = 0;   // dynamic shared memory of a block
  void* stream = nullptr;  // a cudaStream_t
  bool cooperative =
      false;              // all blocks are resident at once, so that they may wait for each other
  unsigned cluster = 1;   // blocks along x that run together and reach each other's shared memory
  bool overlaps = false;  // begins while the kernel before it ends, for which it waits: overlap.cuh
};

#if defined(KIMI_HOST_SIMT)

/// Blocks that the whole device runs at a time: few on the host runner, so that kernels go round.
template <class... Parameters>
int resident_blocks(void (*)(Parameters...), int /*threads*/, size_t /*smem_bytes*/,
                    int cluster = 1) {
  return cluster == 1 ? 5 : 3 * cluster;
}

/// Runs the kernel to its end. Its mistakes are thrown as simt::Error.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  const uint64_t blocks = uint64_t{config.grid.x} * config.grid.y * config.grid.z;
  const int resident = resident_blocks(kernel, 0, 0, static_cast<int>(config.cluster));
  if (config.cooperative && blocks > static_cast<uint64_t>(resident))
    simt::fail("launch: cooperative: expected at most the " + std::to_string(resident) +
               " blocks that are resident, got " + std::to_string(blocks));
  simt::launch(kernel,
               {config.grid, config.block, config.smem_bytes, config.cooperative, config.cluster,
                config.overlaps && overlap_allowed(), config.stream},
               arguments...);
  return Status::ok();
}

inline Status memset_async(void* destination, int byte, size_t bytes, void* stream) {
  simt::synchronize();
  simt::queued_on(stream);
  if (bytes > 0) std::memset(destination, byte, bytes);
  return Status::ok();
}

/// The host runner has the primitives of a Hopper GPU.
inline Status device_sm(int& sm) {
  sm = max_sm() != 0 && max_sm() < 90 ? max_sm() : 90;
  return Status::ok();
}

#else

inline Status cuda_status(const char* what, cudaError_t code) {
  if (code == cudaSuccess) return Status::ok();
  (void)cudaGetLastError();  // it has been reported: the next call starts clean
  return error(KIMI_CUDA_ERROR, what, ": ", cudaGetErrorName(code), ": ", cudaGetErrorString(code));
}

/// What the runtime's answers depend on. A type of our own: the maps over it stay out of the
/// library's exported symbols.
struct LaunchShape {
  const void* kernel;
  int device, threads, cluster;
  size_t smem_bytes;
  auto operator<=>(const LaunchShape&) const = default;
};

/// Opts the kernel into dynamic shared memory beyond the 48 KB that need no asking. The limit only
/// grows, so that a call never takes it from another thread's launch.
template <class... Parameters>
Status allow_shared_memory(void (*kernel)(Parameters...), size_t smem_bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (smem_bytes <= kWithoutAsking) return Status::ok();
  static std::mutex mutex;
  static std::map<LaunchShape, size_t> allowed;  // by kernel and device
  int device = 0;
  KIMI_RETURN_IF_ERROR(cuda_status("launch: device", cudaGetDevice(&device)));
  const std::lock_guard lock(mutex);
  size_t& limit = allowed[{reinterpret_cast<const void*>(kernel), device, 0, 0, 0}];
  if (smem_bytes <= limit) return Status::ok();
  KIMI_RETURN_IF_ERROR(
      cuda_status("launch: shared memory",
                  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(smem_bytes))));
  limit = smem_bytes;
  return Status::ok();
}

inline cudaLaunchAttribute cluster_attribute(unsigned cluster) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  return attribute;
}

/// cudaLaunchKernelEx: queues the kernel; reports what the runtime refuses, not what the kernel
/// does later.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  KIMI_RETURN_IF_ERROR(allow_shared_memory(kernel, config.smem_bytes));
  cudaLaunchAttribute attributes[3]{};
  unsigned count = 0;
  if (config.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (config.cluster > 1) attributes[count++] = cluster_attribute(config.cluster);
  if (config.overlaps && overlap_allowed()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t cuda{};
  cuda.gridDim = config.grid;
  cuda.blockDim = config.block;
  cuda.dynamicSmemBytes = config.smem_bytes;
  cuda.stream = static_cast<cudaStream_t>(config.stream);
  cuda.attrs = attributes;
  cuda.numAttrs = count;
  return cuda_status("launch",
                     cudaLaunchKernelEx(&cuda, kernel, static_cast<Parameters>(arguments)...));
}

inline Status memset_async(void* destination, int byte, size_t bytes, void* stream) {
  if (bytes == 0) return Status::ok();
  return cuda_status("memset",
                     cudaMemsetAsync(destination, byte, bytes, static_cast<cudaStream_t>(stream)));
}

/// Blocks of the kernel that run at the same time on the whole current device, in whole clusters;
/// one cluster where the runtime cannot say (the launch then reports why). Asked once for a kernel,
/// device and launch shape.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t smem_bytes,
                    int cluster = 1) {
  static std::mutex mutex;
  static std::map<LaunchShape, int> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return cluster;
  const LaunchShape key{reinterpret_cast<const void*>(kernel), device, threads, cluster,
                        smem_bytes};
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  // The occupancy is 0 for shared memory that the kernel may not have yet.
  if (!allow_shared_memory(kernel, smem_bytes).is_ok()) return cluster;
  int blocks = 0;
  if (cluster == 1) {
    int multiprocessors = 0;
    if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) !=
            cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, smem_bytes) !=
            cudaSuccess)
      return cluster;
    blocks *= multiprocessors;
  } else {
    cudaLaunchAttribute attribute = cluster_attribute(static_cast<unsigned>(cluster));
    cudaLaunchConfig_t cuda{};
    cuda.gridDim = dim3(static_cast<unsigned>(cluster));
    cuda.blockDim = dim3(static_cast<unsigned>(threads));
    cuda.dynamicSmemBytes = smem_bytes;
    cuda.attrs = &attribute;
    cuda.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&blocks, kernel, &cuda) != cudaSuccess) return cluster;
    blocks *= cluster;
  }
  if (blocks == 0) return cluster;
  return known[key] = blocks;
}

/// Compute capability whose kernels the current device runs, 10 major + minor. Limited by max_sm()
/// to another family it is kMinSm: kernels for 9.x run on 9.x alone.
inline Status device_sm(int& sm) {
  static std::mutex mutex;
  static std::map<LaunchShape, int> known;  // by device; LaunchShape says why not by int
  int device = 0, major = 0, minor = 0;
  KIMI_RETURN_IF_ERROR(cuda_status("device", cudaGetDevice(&device)));
  {
    const std::lock_guard lock(mutex);
    const LaunchShape key{nullptr, device, 0, 0, 0};
    if (const auto found = known.find(key); found != known.end()) {
      sm = found->second;
    } else {
      KIMI_RETURN_IF_ERROR(
          cuda_status("device: compute capability",
                      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
      KIMI_RETURN_IF_ERROR(
          cuda_status("device: compute capability",
                      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)));
      sm = known[key] = 10 * major + minor;
    }
  }
  if (max_sm() != 0 && max_sm() < sm) sm = max_sm() / 10 == sm / 10 ? max_sm() : kMinSm;
  return Status::ok();
}

#endif

}  // namespace kimi
