// SPDX-License-Identifier: MIT
// Bytes of quantised rows to bf16 by tables: e4m3 and nibble - 8 are exact in it, so the halves of a
// result are two look-ups of a byte each. Included by the ISA files only.
//
//   64 bytes, their quarters of 8 in the order 0 4 1 5 2 6 3 7
//   look up lower halves l, upper halves h; unpack within lanes: l0 h0 l1 h1 .. are depths in order
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "gemm/cpu/block_bytes.h"
#include "gemm/cpu/block_pack_avx512.h"

namespace kimi::cpu {
namespace {

struct Words {
  __m512i first, second;  // 32 bf16 each
};

struct alignas(64) Tables {
  uint8_t fp8[2][128], int4[2][64];  // lower, upper halves; 16 nibbles for every lane

  constexpr Tables() : fp8(), int4() {
    for (int half = 0; half < 2; ++half) {
      for (int m = 0; m < 128; ++m) fp8[half][m] = uint8_t(bf16_of_e4m3(m) >> 8 * half);
      for (int n = 0; n < 64; ++n) int4[half][n] = uint8_t(bf16_of_nibble(n % 16) >> 8 * half);
    }
  }
};
constexpr Tables kTables;

inline __m512i quarters_apart(__m512i x) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), x);
}

template <Storage S>
inline Words words_of(__m512i x) {
  const auto table = [](const uint8_t* at) { return _mm512_load_si512(at); };
  __m512i low, high;
  if constexpr (S == Storage::kFp8Block) {
    const auto look_up = [&](const uint8_t* of) {
      return _mm512_permutex2var_epi8(table(of), x, table(of + 64));  // the sign is no index
    };
    low = look_up(kTables.fp8[0]);
    high = _mm512_ternarylogic_epi32(look_up(kTables.fp8[1]), x, _mm512_set1_epi8(-128), 0xf8);
  } else {
    low = _mm512_shuffle_epi8(table(kTables.int4[0]), x);
    high = _mm512_shuffle_epi8(table(kTables.int4[1]), x);
  }
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

// n <= 64 depths of a row, without their scales; beyond them any finite values.
template <Storage S>
inline Words row64(const Operand& x, int64_t row, int64_t depth, int64_t n) {
  const int64_t at = row * x.row_stride + depth;
  const uint8_t* bytes = static_cast<const uint8_t*>(x.data);
  if constexpr (S == Storage::kFp8Block) {
    const __mmask64 mask = n >= 64 ? ~0ull : (1ull << n) - 1;
    return words_of<S>(quarters_apart(_mm512_maskz_loadu_epi8(mask, bytes + at)));
  } else {
    const __m256i pairs = _mm256_maskz_loadu_epi8(first32((n + 1) / 2), bytes + at / 2);
    const __m512i wide = _mm512_cvtepu8_epi16(pairs);
    const __m512i nibbles =
        _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
    return words_of<S>(quarters_apart(nibbles));
  }
}

}  // namespace
}  // namespace kimi::cpu
