// SPDX-License-Identifier: MIT
// Packing on AVX-512. A packed block is rows of 32-bit words: [depth][W] fp32, or [depth / 2][W]
// pairs of bf16; W = rows of a panel group or of a strip. Sixteen rows at a time:
//
//   depth contiguous   a transpose of 16 x 16 words, straight from memory where nothing is
//   converted rows contiguous    a vector of 16 rows for one depth, or two interleaved, one store
//   anything else      element by element
//
// `C` is the compute type, kSpan = depths in a vector of words. Included by the ISA files only.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "gemm/cpu/block.h"
#include "gemm/cpu/block_element.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

inline __mmask16 first16(int64_t n) { return n >= 16 ? 0xffff : __mmask16((1u << n) - 1); }
inline __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : __mmask32((1u << n) - 1); }

// Sixteen rows of sixteen words become sixteen stores of one word of every row. Quarters of the
// rows are loaded into the lanes where they end, so that only shuffles within lanes remain.
inline void store_transposed(const char* const rows[16], int64_t words, uint32_t* to, int64_t width,
                             __mmask16 lanes) {
  for (int64_t w = 0; w < words; w += 4) {
    __m512i r[4];
    for (int i = 0; i < 4; ++i) {
      const auto quarter = [&](int row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row + i] + 4 * w));
      };
      r[i] = _mm512_castsi128_si512(quarter(0));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x00f0, quarter(4));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x0f00, quarter(8));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xf000, quarter(12));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]);
    const __m512i high01 = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(r[2], r[3]);
    const __m512i high23 = _mm512_unpackhi_epi32(r[2], r[3]);
    const __m512i word[4] = {
        _mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
        _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
    for (int i = 0; i < 4; ++i)
      if (w + i < words) _mm512_mask_storeu_epi32(to + (w + i) * width, lanes, word[i]);
  }
}

// n <= 16 consecutive elements as fp32; the rest are zeros and not read.
inline __m512 load16(const float* x, __mmask16 n) { return _mm512_maskz_loadu_ps(n, x); }
inline __m512 load16(const bf16* x, __mmask16 n) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(n, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512 load16(const fp16* x, __mmask16 n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(n, x));
}

// e4m3 to fp32 by way of fp16, 2^8 smaller: exact, subnormals too.
inline __m512 load16_e4m3(const uint8_t* x, __mmask16 n) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(n, x));
  const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
  const __m256i sign =
      _mm256_and_si256(_mm256_slli_epi16(wide, 8), _mm256_set1_epi16(short(0x8000)));
  const __m256i half = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), _mm256_or_si256(sign, nan));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}

// n <= 16 nibbles from bit 0 of x on, as nibble - 8.
inline __m512 load16_int4(const uint8_t* x, int64_t n) {
  const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1u << ((n + 1) / 2)) - 1), x);
  const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
  return _mm512_maskz_sub_ps(first16(n), _mm512_cvtepi32_ps(wide), _mm512_set1_ps(8.0f));
}

template <Storage S>
inline __m512 load16_at(const void* data, int64_t at, __mmask16 n) {
  if constexpr (S == Storage::kBfloat16) return load16(static_cast<const bf16*>(data) + at, n);
  if constexpr (S == Storage::kFloat16) return load16(static_cast<const fp16*>(data) + at, n);
  return load16(static_cast<const float*>(data) + at, n);
}

// n <= 16 depths of one row of a matrix whose depth is contiguous.
template <Storage S>
inline __m512 row16(const Operand& x, int64_t row, int64_t depth, int64_t n) {
  const int64_t at = row * x.row_stride + depth;
  const uint8_t* bytes = static_cast<const uint8_t*>(x.data);
  if constexpr (S == Storage::kFp8Block)  // 16 depths never straddle a block
    return _mm512_mul_ps(load16_e4m3(bytes + at, first16(n)),
                         _mm512_set1_ps(fp8_scale(x, row, depth)));
  if constexpr (S == Storage::kInt4Group)
    return _mm512_mul_ps(load16_int4(bytes + at / 2, n), _mm512_set1_ps(int4_scale(x, row, depth)));
  return load16_at<S>(x.data, at, first16(n));
}

constexpr int64_t kZeros = INT64_MIN;  // a place that no stride leads to, backwards neither

struct Float32 {
  static constexpr int64_t kSpan = 16, kPair = 1;
  static constexpr Storage kStorage = Storage::kFloat32;  // of operands that need no conversion

  template <Storage S>
  static __m512i row(const Operand& x, int64_t row, int64_t depth, int64_t n) {
    return _mm512_castps_si512(row16<S>(x, row, depth, n));
  }
  // `at`: the first element of each depth, or kZeros.
  template <Storage S>
  static __m512i column(const Operand& x, const int64_t at[], __mmask16 n) {
    return _mm512_castps_si512(at[0] == kZeros ? _mm512_setzero_ps()
                                               : load16_at<S>(x.data, at[0], n));
  }
  static uint32_t word(const float values[]) { return bits_of(values[0]); }
  // A faster way for whole strips whose rows are contiguous; false: it does not apply.
  template <Storage S, int64_t kWidth>
  static bool pack_columns(const Operand&, int64_t, int64_t, int64_t, int64_t, int64_t, uint32_t*) {
    return false;
  }
};

// Depth is contiguous: vectors along a row.
inline bool along_rows(const Operand& x) { return x.depth_stride == 1 && !x.depth_index; }
// Rows are contiguous: vectors of one depth.
inline bool along_columns(const Operand& x) {
  return x.row_stride == 1 && !x.row_index && x.storage <= Storage::kFloat16;
}

// The words of depths depth + d.. of all `rows` <= 16 rows, where rows are contiguous.
template <class C, Storage S>
__m512i column(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t d,
               int64_t count) {
  int64_t at[C::kPair];
  for (int64_t i = 0; i < C::kPair; ++i) {
    const int64_t source =
        d + i < count ? gathered(x.depth_index, x.index_divisor, depth + d + i) : -1;
    at[i] = source < 0 ? kZeros : row + source * x.depth_stride;
  }
  return C::template column<S>(x, at, first16(rows));
}

// The word of depths depth + d.. of one row, for any strides.
template <class C>
uint32_t word(const Operand& x, int64_t row, int64_t depth, int64_t d, int64_t count) {
  float values[C::kPair] = {};
  for (int64_t i = 0; i < C::kPair; ++i)
    if (d + i < count) values[i] = read_element(x, row, depth + d + i);
  return C::word(values);
}

// A group of `rows` <= 16 rows into the word columns [0, lanes) of a block `width` words wide.
template <class C, Storage S>
void pack_group(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                int64_t padded, uint32_t* to, int64_t width, int64_t lanes) {
  const __mmask16 store = first16(lanes);
  if (along_rows(x)) {
    int64_t source[16];
    const char* from[16];
    bool whole = rows == lanes && S == C::kStorage;  // nothing to convert and no row of zeros
    for (int64_t r = 0; r < 16; ++r) {
      source[r] = r < rows ? gathered(x.row_index, x.index_divisor, row + r) : -1;
      whole = whole && (source[r] >= 0 || r >= lanes);
      // beyond the lanes any row does: nothing of it is stored
      const int64_t at = r < lanes ? source[r] : source[0];
      from[r] = static_cast<const char*>(x.data) + (at * x.row_stride + depth) * (4 / C::kPair);
    }
    int64_t d = 0;
    for (; whole && d + C::kSpan <= count; d += C::kSpan) {
      store_transposed(from, 16, to + d / C::kPair * width, width, store);
      for (int r = 0; r < 16; ++r) from[r] += 64;
    }
    if (d == padded) return;
    alignas(64) uint32_t converted[16][16] = {};
    for (int r = 0; r < 16; ++r) from[r] = reinterpret_cast<const char*>(converted[r]);
    for (; d < padded; d += C::kSpan) {
      const int64_t n = count - d < C::kSpan ? count - d : C::kSpan;
      const int64_t span = padded - d < C::kSpan ? padded - d : C::kSpan;
      for (int64_t r = 0; r < rows; ++r)
        if (source[r] >= 0)
          _mm512_store_si512(converted[r], C::template row<S>(x, source[r], depth + d, n));
      store_transposed(from, span / C::kPair, to + d / C::kPair * width, width, store);
    }
    return;
  }
  for (int64_t d = 0; d < padded; d += C::kPair) {
    uint32_t* words = to + d / C::kPair * width;
    if (along_columns(x))
      _mm512_mask_storeu_epi32(words, store, column<C, S>(x, row, rows, depth, d, count));
    else
      for (int64_t r = 0; r < lanes; ++r)
        words[r] = r < rows ? word<C>(x, row + r, depth, d, count) : 0;
  }
}

// Groups of `width` rows, depth block by depth block, as BlockEngine::pack_panel says.
template <class C, int64_t kWidth, int64_t kDepthBlock, int64_t kMultiple>
void pack(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count, void* packed) {
  dispatch_storage(x.storage, [&]<Storage S>() {
    uint32_t* to = static_cast<uint32_t*>(packed);
    for (int64_t done = 0; done < count; done += kDepthBlock) {
      const int64_t block = count - done < kDepthBlock ? count - done : kDepthBlock;
      const int64_t padded = round_up(block, kMultiple);
      for (int64_t group = 0; group < rows; group += kWidth, to += padded / C::kPair * kWidth)
        for (int64_t part = 0; part < kWidth; part += 16) {
          if (C::template pack_columns<S, kWidth>(x, row + group, rows - group, depth + done, block,
                                                  padded, to))
            break;
          const int64_t left = rows - group - part, lanes = kWidth - part < 16 ? kWidth - part : 16;
          pack_group<C, S>(x, row + group + part,
                           left < 0       ? 0
                           : left < lanes ? left
                                          : lanes,
                           depth + done, block, padded, to + part, kWidth, lanes);
        }
    }
  });
}

}  // namespace
}  // namespace kimi::cpu
