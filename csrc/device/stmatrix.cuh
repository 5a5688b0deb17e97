// SPDX-License-Identifier: MIT
//
// stmatrix (sm_90): a warp stores four 8x8 matrices of 16-bit values, the way mma and wgmma hold
// them.
//
//   lane l gives the address of row l % 8 of matrix l / 8: 16 bytes, a multiple of 16
//   register m of lane l: row l / 4 of matrix m, columns 2 (l % 4) and 2 (l % 4) + 1, the first in
//   the low half
//
// The transposed form stores the matrices with rows and columns exchanged.
#pragma once

#include "device/mbarrier.cuh"
#include "device/platform.cuh"

namespace kimi {

#if defined(KIMI_HOST_SIMT)

namespace detail {
/// Every lane writes the row whose address it gave; the values come through the warp.
template <bool kTransposed>
void stmatrix_x4(void* row, const uint32_t (&registers)[4], std::source_location where) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    simt::fail("stmatrix_x4: the address of a row must be a multiple of 16 bytes");
  simt::detail::check_shared(row, 16, "stmatrix_x4");
  const int lane = static_cast<int>(simt::detail::builtins("stmatrix_x4").linear_thread % 32);
  uint16_t values[8];
  for (int m = 0; m < 4; ++m)
    for (int c = 0; c < 8; ++c) {
      const int of_row = lane % 8;
      const int source = kTransposed ? c * 4 + of_row / 2 : of_row * 4 + c / 2;
      const uint32_t pair = __shfl_sync(~0u, registers[m], source, 32, where);
      const int half = kTransposed ? of_row % 2 : c % 2;
      if (m == lane / 8) values[c] = static_cast<uint16_t>(pair >> 16 * half);
    }
  std::memcpy(row, values, sizeof values);
  simt::generic_write(row, sizeof values);
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
