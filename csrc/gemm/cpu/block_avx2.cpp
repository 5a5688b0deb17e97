// SPDX-License-Identifier: MIT
// Block products on AVX2 in fp32: tiles of 6 x 16, 12 of 16 registers hold sums. Packing moves
// eight rows at a time: a transpose of 8 x 8 words where depth is contiguous, plain vectors where
// rows are.
#include "cpu/vec_avx2.h"
#include "gemm/cpu/block_dot_simd.h"
#include "gemm/cpu/block_element.h"
#include "gemm/cpu/block_simd.h"
#include "gemm/cpu/block_spread_simd.h"

namespace kimi::cpu {
namespace {

struct Tile : Avx2 {
  using Pack = float;
  static constexpr int64_t kRows = 6, kPair = 1;

  static F load_pack(const float* x) { return load(x); }
  static F broadcast(const float* x) { return set(*x); }
  static F multiply_add(F a, F b, F sum) { return fma(a, b, sum); }
};

constexpr int64_t kDepthBlock = 256;

inline void transpose8(__m256 r[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Depths [from, to) of `width` rows, element by element.
void pack_elements(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t from,
                   int64_t to, float* packed, int64_t width, int64_t lanes) {
  for (int64_t d = from; d < to; ++d)
    for (int64_t r = 0; r < lanes; ++r)
      packed[d * width + r] = r < rows ? read_element(x, row + r, depth + d) : 0.0f;
}

// Eight depths of a row.
struct Rows : Avx2 {
  // By way of fp16, 2^8 smaller: exact, subnormals too.
  static F load_e4m3(const uint8_t* x) {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
    const __m128i magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_and_si128(_mm_slli_epi16(wide, 8), _mm_set1_epi16(short(0x8000)));
    const __m128i half = _mm_or_si128(_mm_slli_epi16(magnitude, 7), _mm_or_si128(sign, nan));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
  }
  static F load_int4(const uint8_t* x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, 4);
    const __m128i wide = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(bytes));
    const __m128i nibbles =
        _mm_and_si128(_mm_or_si128(wide, _mm_slli_epi16(wide, 4)), _mm_set1_epi8(15));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_sub_epi8(nibbles, _mm_set1_epi8(8))));
  }
};

// `rows` <= lanes <= 8 rows of a group `width` wide.
template <Storage S>
void pack_group(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                float* to, int64_t width, int64_t lanes) {
  int64_t d = 0;
  if (x.depth_stride == 1 && !x.depth_index && rows == lanes) {
    int64_t source[8];
    for (int64_t r = 0; r < 8; ++r)
      source[r] = r < rows ? gathered(x.row_index, x.index_divisor, row + r) : -1;
    for (; d + 8 <= count; d += 8) {
      __m256 v[8];
      for (int r = 0; r < 8; ++r)
        v[r] = source[r] < 0 ? _mm256_setzero_ps() : row_of<Rows, S>(x, source[r], depth + d, 8);
      transpose8(v);
      for (int i = 0; i < 8; ++i) {
        alignas(32) float words[8];
        if (lanes == 8) {
          _mm256_storeu_ps(to + (d + i) * width, v[i]);
        } else {
          _mm256_store_ps(words, v[i]);
          __builtin_memcpy(to + (d + i) * width, words, size_t(lanes) * 4);
        }
      }
    }
  }
  pack_elements(x, row, rows, depth, d, count, to, width, lanes);
}

// A group whose rows are contiguous, all kWidth of a depth at once: strides that are powers of two
// leave a line in the cache for one use only.
template <class T, int64_t kWidth>
void pack_columns(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                  float* to) {
  const T* data = static_cast<const T*>(x.data) + row;
  for (int64_t d = 0; d < count; ++d, to += kWidth) {
    const int64_t at = gathered(x.depth_index, x.index_divisor, depth + d);
    for (int64_t part = 0; part < kWidth; part += 8) {
      const __m256 v = at < 0 || rows <= part ? _mm256_setzero_ps()
                                              : Avx2::load(data + at * x.depth_stride + part,
                                                           int(rows - part < 8 ? rows - part : 8));
      // What a vector has beyond the group the next depth overwrites.
      if (kWidth % 8 == 0 || d + 1 < count)
        _mm256_storeu_ps(to + part, v);
      else
        memcpy(to + part, &v, sizeof(float) * (kWidth % 8));
    }
  }
}

template <int64_t kWidth>
void pack(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count, void* packed) {
  float* to = static_cast<float*>(packed);
  for (int64_t done = 0; done < count; done += kDepthBlock) {
    const int64_t block = count - done < kDepthBlock ? count - done : kDepthBlock;
    for (int64_t group = 0; group < rows; group += kWidth, to += block * kWidth) {
      if (x.row_stride == 1 && !x.row_index && x.storage <= Storage::kFloat16 &&
          (x.depth_stride != 1 || x.depth_index)) {
        dispatch(kimi_dtype(x.storage), [&]<class T>() {
          pack_columns<T, kWidth>(x, row + group, rows - group, depth + done, block, to);
        });
        continue;
      }
      for (int64_t part = 0; part < kWidth; part += 8) {
        const int64_t left = rows - group - part, lanes = kWidth - part < 8 ? kWidth - part : 8;
        const int64_t live = left < 0 ? 0 : left < lanes ? left : lanes;
        dispatch_storage(x.storage, [&]<Storage S>() {
          pack_group<S>(x, row + group + part, live, depth + done, block, to + part, kWidth, lanes);
        });
      }
    }
  }
}

struct Dot : Rows {
  using Token = float;
  static constexpr int64_t kSpan = 8, kPassTokens = 4, kOnePass = 3;
  static constexpr bool kHoldsRows = true, kScales = false;
  static constexpr int kRows[] = {8, 6, 4, 3};

  static F zero() { return set(0.0f); }
  static F multiply_add(F a, F b, F sum) { return fma(a, b, sum); }
  template <Storage S>
  static F row(const Operand& x, int64_t row, int64_t depth, int64_t n) {
    return row_of<Dot, S>(x, row, depth, n);
  }
  static void store_sums(float* to, int n, F a, F b, F c, F d) {
    const F quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 sums =
        _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1));
    const __m128i lanes = _mm_setr_epi32(0, 1, 2, 3);
    _mm_maskstore_ps(to, _mm_cmplt_epi32(lanes, _mm_set1_epi32(n)), sums);
  }
};

}  // namespace

extern const BlockEngine kAvx2Blocks = {Tile::kRows,
                                        kDepthBlock,
                                        1,
                                        4,
                                        pack<Tile::kRows>,
                                        pack<kStripRows>,
                                        multiply<Tile>,
                                        nullptr,
                                        12,
                                        Dot::kPassTokens,
                                        12,
                                        pack_dot<Dot>,
                                        dot<Dot>,
                                        spread<Avx2, float, 4>};

}  // namespace kimi::cpu
