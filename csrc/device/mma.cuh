// SPDX-License-Identifier: MIT
//
// mma.sync and ldmatrix: products of 16-bit matrices by a warp, with fp32 sums (sm_80 on).
//
//   d[16][8] += a[16][16] b[16][8]          lane l, g = l / 4, t = l % 4; a register holds two
//   values a   0: row g     depth 2t, 2t+1         1: row g + 8   2: depth + 8   3: row g + 8,
//   depth + 8 b   0: col g     depth 2t, 2t+1         1: depth + 8 d   0, 1: row g, cols 2t, 2t+1
//   2, 3: row g + 8
//
// ldmatrix reads four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of
// matrix l / 8 and gets row g, columns 2t, 2t+1 of each matrix: a and b from memory that is
// contiguous along the depth. `transposed`: column g, rows 2t, 2t+1: from memory that is contiguous
// along the rows of a or the columns of b.
#pragma once

#include "common/dtype.h"
#include "device/platform.cuh"
#include "device/warp.cuh"

namespace kimi {

#if defined(KIMI_HOST_SIMT)

namespace detail {
// What a lane shows the others of its warp while it waits for them.
struct MatrixLane {
  const void* row;       // that it names
  const void* rows[32];  // that all name
};
inline void share_rows(MatrixLane& lane, const char* what, std::source_location where) {
  if (reinterpret_cast<uintptr_t>(lane.row) % 16 != 0)
    simt::fail(std::string(what) + ": the address must be a multiple of 16 bytes");
  simt::detail::check_shared(lane.row, 16, what);
  const simt::detail::Resolve resolve = [](const simt::detail::WarpSlots& slots, int l) {
    auto* self = reinterpret_cast<MatrixLane*>(slots.value[l]);
    for (int i = 0; i < 32; ++i)
      self->rows[i] = reinterpret_cast<const MatrixLane*>(slots.value[i])->row;
    return uint64_t{0};
  };
  simt::detail::warp_operation(what, resolve, kFullWarp, reinterpret_cast<uint64_t>(&lane), 0,
                               where);
}
inline uint32_t pair_of(const void* low, const void* high) {
  uint16_t bits[2];
  std::memcpy(&bits[0], low, 2);
  std::memcpy(&bits[1], high, 2);
  return bits[0] | uint32_t{bits[1]} << 16;
}
inline const char* half_at(const void* row, int column) {
  return static_cast<const char*>(row) + 2 * column;
}

struct MmaLane {
  const uint32_t *a, *b;
  float* d;
};
template <class T>
float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * which)});
}
}  // namespace detail

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row,
                        std::source_location where = std::source_location::current()) {
  detail::MatrixLane lane{row, {}};
  detail::share_rows(lane, "ldmatrix_x4", where);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int i = 0; i < 4; ++i) {
    const void* from = lane.rows[8 * i + g];
    r[i] = detail::pair_of(detail::half_at(from, 2 * t), detail::half_at(from, 2 * t + 1));
  }
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row,
                                   std::source_location where = std::source_location::current()) {
  detail::MatrixLane lane{row, {}};
  detail::share_rows(lane, "ldmatrix_x4_transposed", where);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int i = 0; i < 4; ++i)
    r[i] = detail::pair_of(detail::half_at(lane.rows[8 * i + 2 * t], g),
                           detail::half_at(lane.rows[8 * i + 2 * t + 1], g));
}

// The sixteen products and the old sum are added exactly and rounded once: hardware adds them in an
// order of its own, with at least the precision of fp32.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  std::source_location where = std::source_location::current()) {
  detail::MmaLane lane{a, b, d};
  const simt::detail::Resolve resolve = [](const simt::detail::WarpSlots& slots, int l) {
    const auto at = [&](int i) { return reinterpret_cast<const detail::MmaLane*>(slots.value[i]); };
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      double sum = at(l)->d[i];
      for (int k = 0; k < 16; ++k) {
        const uint32_t a_pair = at(4 * g + k % 8 / 2)->a[i / 2 + k / 8 * 2];
        const uint32_t b_pair = at(4 * (2 * t + i % 2) + k % 8 / 2)->b[k / 8];
        sum += double{detail::half_of<T>(a_pair, k % 2)} * detail::half_of<T>(b_pair, k % 2);
      }
      at(l)->d[i] = static_cast<float>(sum);
    }
    return uint64_t{0};
  };
  simt::detail::warp_operation("mma_m16n8k16", resolve, kFullWarp,
                               reinterpret_cast<uint64_t>(&lane), 0, where);
}

#else

/// ldmatrix.sync.aligned.m8n8.x4.shared.b16
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

/// ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16
__device__ inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

/// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32: d += a b
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace kimi
