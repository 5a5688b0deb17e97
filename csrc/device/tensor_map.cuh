// SPDX-License-Identifier: MIT
//
// A tensor map: what TMA is told about a tensor in global memory and the box that it moves at a
// time. The host encodes it; a kernel takes it as `const __grid_constant__ TensorMap map`.
//
//   sizes[0]          the contiguous dimension
//   strides_bytes[d]  from one to the next in dimension d + 1: 16 divides it
//   Swizzle::k128     rows of 128 bytes, 16-byte piece p of row r at place p ^ (r % 8), so that
//                     columns have no bank conflicts: what wgmma reads
#pragma once

#include <type_traits>

#include "common/dtype.h"
#include "common/status.h"
#include "device/launch.cuh"
#include "device/platform.cuh"

#if !defined(KIMI_HOST_SIMT)
#include <cuda.h>
#endif

namespace kimi {

enum class Swizzle { kNone, k128 };

#if defined(KIMI_HOST_SIMT)
struct alignas(64) TensorMap {
  const char* base;
  int64_t sizes[3], strides_bytes[3];  // strides_bytes[0]: of an element
  int32_t box[3];
  int32_t rank;
  Swizzle swizzle;
  kimi_dtype dtype;  // of a reduction; meaningless for bytes
  char unused[40];
};
#else
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
#endif
static_assert(sizeof(TensorMap) == 128);

namespace detail {

/// What cuTensorMapEncodeTiled refuses without saying why.
inline Status check_tensor_map(const void* base, int rank, const int64_t* sizes,
                               const int64_t* strides_bytes, const int32_t* box, Swizzle swizzle,
                               int64_t element_bytes) {
  constexpr const char* kWhat = "tensor map: ";
  if (rank != 2 && rank != 3) return invalid(kWhat, "rank: expected 2 or 3, got ", rank);
  if (base == nullptr || reinterpret_cast<uintptr_t>(base) % 16 != 0)
    return invalid(kWhat, "base: expected an address that 16 divides, got ", base);
  for (int d = 0; d < rank; ++d) {
    if (sizes[d] < 1 || sizes[d] > int64_t{1} << 32)
      return invalid(kWhat, "sizes[", d, "]: expected 1 to 2^32, got ", sizes[d]);
    if (box[d] < 1 || box[d] > 256)
      return invalid(kWhat, "box[", d, "]: expected 1 to 256, got ", box[d]);
  }
  for (int d = 0; d + 1 < rank; ++d)
    if (strides_bytes[d] < 0 || strides_bytes[d] % 16 != 0 || strides_bytes[d] >= int64_t{1} << 40)
      return invalid(kWhat, "strides_bytes[", d, "]: expected a multiple of 16 below 2^40, got ",
                     strides_bytes[d]);
  const int64_t row_bytes = box[0] * element_bytes;
  if (row_bytes % 16 != 0)
    return invalid(kWhat, "box[0]: expected a multiple of 16 bytes, got ", row_bytes, " bytes");
  if (swizzle == Swizzle::k128 && row_bytes != 128)
    return invalid(kWhat, "box[0]: expected 128 bytes with a swizzle of 128 bytes, got ",
                   row_bytes);
  return Status::ok();
}

}  // namespace detail

#if defined(KIMI_HOST_SIMT)

template <class T>
Status encode_tensor_map(TensorMap* map, const void* base, int rank, const int64_t* sizes,
                         const int64_t* strides_bytes, const int32_t* box, Swizzle swizzle) {
  KIMI_RETURN_IF_ERROR(
      detail::check_tensor_map(base, rank, sizes, strides_bytes, box, swizzle, sizeof(T)));
  *map = {};
  map->base = static_cast<const char*>(base);
  map->rank = rank;
  map->swizzle = swizzle;
  map->dtype = kDtype<T>;
  for (int d = 0; d < 3; ++d) {
    map->sizes[d] = d < rank ? sizes[d] : 1;
    map->box[d] = d < rank ? box[d] : 1;
    map->strides_bytes[d] = d == 0     ? static_cast<int64_t>(sizeof(T))
                            : d < rank ? strides_bytes[d - 1]
                                       : 0;
  }
  return Status::ok();
}

#else

namespace detail {

template <class T>
constexpr CUtensorMapDataType tensor_map_type() {
  if (std::is_same_v<T, bf16>) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (std::is_same_v<T, fp16>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (std::is_same_v<T, float>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  static_assert(sizeof(T) == 1 || std::is_same_v<T, bf16> || std::is_same_v<T, fp16> ||
                    std::is_same_v<T, float>,
                "bf16, fp16, float or a byte");
  return CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, or nullptr where there is no driver or an old one: the library does not
/// link to it.
inline EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                            12000, cudaEnableDefault, &found);
#else
  const cudaError_t code =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (code != cudaSuccess) (void)cudaGetLastError();
  if (code != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeTiled>(function);
}

}  // namespace detail

/// cuTensorMapEncodeTiled: L2 promotion of 256 bytes, zeros out of bounds. T is bf16, fp16, float,
/// or a byte for FP8.
template <class T>
Status encode_tensor_map(TensorMap* map, const void* base, int rank, const int64_t* sizes,
                         const int64_t* strides_bytes, const int32_t* box, Swizzle swizzle) {
  KIMI_RETURN_IF_ERROR(
      detail::check_tensor_map(base, rank, sizes, strides_bytes, box, swizzle, sizeof(T)));
  static const detail::EncodeTiled encode = detail::find_encode_tiled();
  if (encode == nullptr)
    return error(
        KIMI_CUDA_ERROR,
        "tensor map: the driver has no cuTensorMapEncodeTiled: TMA needs driver 525 or newer");
  cuuint64_t size[3], stride[2];
  cuuint32_t extent[3], step[3] = {1, 1, 1};
  for (int d = 0; d < rank; ++d) {
    size[d] = static_cast<cuuint64_t>(sizes[d]);
    extent[d] = static_cast<cuuint32_t>(box[d]);
    if (d > 0) stride[d - 1] = static_cast<cuuint64_t>(strides_bytes[d - 1]);
  }
  CUtensorMap encoded;  // its alignment is stricter than ours
  const CUresult code =
      encode(&encoded, detail::tensor_map_type<T>(), static_cast<cuuint32_t>(rank),
             const_cast<void*>(base), size, stride, extent, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle == Swizzle::k128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS)
    return error(KIMI_CUDA_ERROR, "tensor map: cuTensorMapEncodeTiled refused rank ", rank,
                 ", sizes ", sizes[0], " ", sizes[1], ", box ", box[0], " ", box[1], ": CUresult ",
                 static_cast<int>(code));
  static_assert(sizeof encoded == sizeof *map);
  std::memcpy(map, &encoded, sizeof encoded);
  return Status::ok();
}

#endif

}  // namespace kimi
