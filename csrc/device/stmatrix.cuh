// SPDX-License-Identifier: MIT
//
// stmatrix (sm_90): a warp stores four 8x8 matrices of 16-bit values as mma and wgmma hold them.
//
//   lane l gives the address of row l % 8 of matrix l / 8: 16 bytes, which 16 divides
//   register m of lane l holds row l / 4 of matrix m, columns 2 (l % 4) (low half) and the next
//
// The transposed form exchanges rows and columns of each matrix.
#pragma once

#include "device/mbarrier.cuh"
#include "device/platform.cuh"

namespace kimi {

#if defined(KIMI_HOST_SIMT)

namespace detail {
/// Every lane writes what it holds to the rows whose addresses other lanes give.
template <bool kTransposed>
void stmatrix_x4(void* row, const uint32_t (&registers)[4], std::source_location where) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    simt::fail("stmatrix_x4: the address of a row must be a multiple of 16 bytes");
  simt::detail::check_shared(row, 16, "stmatrix_x4");
  const int lane = simt::detail::builtins("stmatrix_x4").linear_thread % 32;
  for (int m = 0; m < 4; ++m)
    for (int half = 0; half < 2; ++half) {
      const int r = lane / 4, c = lane % 4 * 2 + half;
      const int to_row = kTransposed ? c : r, to_column = kTransposed ? r : c;
      const auto value = static_cast<uint16_t>(registers[m] >> 16 * half);
      const uint64_t to =
          __shfl_sync(~0u, reinterpret_cast<uintptr_t>(row), m * 8 + to_row, 32, where);
      std::memcpy(reinterpret_cast<uint16_t*>(to) + to_column, &value, sizeof value);
    }
  simt::generic_write(row, 16);
}
}  // namespace detail

inline void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3,
                        std::source_location where = std::source_location::current()) {
  detail::stmatrix_x4<false>(row, {r0, r1, r2, r3}, where);
}
inline void stmatrix_x4_transposed(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3,
                                   std::source_location where = std::source_location::current()) {
  detail::stmatrix_x4<true>(row, {r0, r1, r2, r3}, where);
}

#else

/// stmatrix.sync.aligned.m8n8.x4.shared.b16
__device__ __forceinline__ void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2,
                                            uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   detail::shared_u32(row)),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

/// stmatrix.sync.aligned.m8n8.x4.trans.shared.b16
__device__ __forceinline__ void stmatrix_x4_transposed(void* row, uint32_t r0, uint32_t r1,
                                                       uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   detail::shared_u32(row)),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

#endif

}  // namespace kimi
