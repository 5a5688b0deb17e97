// SPDX-License-Identifier: MIT
// AMX: eight tile registers of 16 rows x 64 bytes a thread, and the product of two of them.
//
//                 B  16 pairs of depths x 16 columns, bf16
//                 [ b[0][n] b[1][n] | ... ]
//   A  16 rows    [ b[2][n] b[3][n] | ... ]     C  16 x 16 fp32
//   x 32 depths   ...                           C[m][n] += (sum of even depths) + (sum of odd ones)
//
// The sums of the even and of the odd depths start from zero and are fp32 fused multiply-adds in
// ascending order, rounded to nearest even, subnormal inputs and results zero whatever MXCSR says.
// KIMI_HOST_TILES puts a model of exactly that in the place of the instructions (tests/tiles).
//
// Register numbers are template arguments: they are part of the instructions. Included by AMX files
// only.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include <atomic>

#if defined(KIMI_HOST_TILES)
#include "tiles.h"
#endif

namespace kimi::cpu {
namespace {  // every ISA file has its own copy
namespace tile {

constexpr int64_t kRows = 16, kRowBytes = 64, kBytes = 1024, kDepths = 32;

// Operand of ldtilecfg: palette 1, all registers whole.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr Config kWhole;

#if defined(KIMI_HOST_TILES)
inline void load_config(const void* config) { ::tiles::load_config(config); }
inline void store_config(void* config) { ::tiles::store_config(config); }
inline void release() { ::tiles::release(); }
template <int kTile>
inline void zero() {
  ::tiles::zero(kTile);
}
template <int kTile>
inline void load(const void* from, int64_t stride) {
  ::tiles::load(kTile, from, stride);
}
template <int kTile>
inline void store(void* to, int64_t stride) {
  ::tiles::store(kTile, to, stride);
}
template <int kSum, int kA, int kB>
inline void dot() {
  ::tiles::dot_bf16(kSum, kA, kB);
}
#else
inline void load_config(const void* config) { _tile_loadconfig(config); }
inline void store_config(void* config) { _tile_storeconfig(config); }
inline void release() { _tile_release(); }
template <int kTile>
void zero();
template <int kTile>
void load(const void* from, int64_t stride);  // stride between rows, in bytes
template <int kTile>
void store(void* to, int64_t stride);
template <int kSum, int kA, int kB>
void dot();

// GCC pastes the number into the text of the instruction, so it must be a literal.
#define KIMI_TILE(n)                                      \
  template <>                                             \
  inline void zero<n>() {                                 \
    _tile_zero(n);                                        \
  }                                                       \
  template <>                                             \
  inline void load<n>(const void* from, int64_t stride) { \
    _tile_loadd(n, from, stride);                         \
  }                                                       \
  template <>                                             \
  inline void store<n>(void* to, int64_t stride) {        \
    _tile_stored(n, to, stride);                          \
  }
#define KIMI_TILE_DOT(sum, a, b) \
  template <>                    \
  inline void dot<sum, a, b>() { \
    _tile_dpbf16ps(sum, a, b);   \
  }
KIMI_TILE(0)
KIMI_TILE(1)
KIMI_TILE(2)
KIMI_TILE(3)
KIMI_TILE(4)
KIMI_TILE(5)
KIMI_TILE(6)
KIMI_TILE(7)
// Four sums of two A (4, 5) and two B (6, 7).
KIMI_TILE_DOT(0, 4, 6)
KIMI_TILE_DOT(1, 4, 7)
KIMI_TILE_DOT(2, 5, 6)
KIMI_TILE_DOT(3, 5, 7)
#undef KIMI_TILE
#undef KIMI_TILE_DOT
#endif

// Makes all registers of this thread whole, if they are not already. Tile state belongs to nobody:
// another library on the thread may have changed or released it since (calls need not preserve it),
// so the processor is asked, which costs tens of clocks, and not a flag of our own; ldtilecfg costs
// hundreds. The loads are volatile and fenced because GCC's intrinsics tell the compiler neither
// that all 64 bytes are written nor what a tile load reads.
inline void configure() {
  alignas(64) volatile uint64_t now[8] = {};
  store_config(const_cast<uint64_t*>(now));
  uint64_t want[8], different = 0;
  __builtin_memcpy(want, &kWhole, sizeof want);
  for (int i = 0; i < 8; ++i) different |= now[i] ^ want[i];
  if (different) load_config(&kWhole);
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

}  // namespace tile
}  // namespace
}  // namespace kimi::cpu
