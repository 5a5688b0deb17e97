// SPDX-License-Identifier: MIT
// Block products in plain C++: the definition of the packed forms, [depth][4 or 32 rows] fp32.
#include <algorithm>
#include <bit>
#include <cstring>

#include "gemm/cpu/block.h"
#include "gemm/cpu/block_bytes.h"
#include "gemm/cpu/block_dot_simd.h"
#include "gemm/cpu/block_element.h"
#include "gemm/cpu/block_spread_simd.h"

namespace kimi::cpu {
namespace {

constexpr int64_t kRows = 4, kDepthBlock = 256;

struct Values {
  float e4m3[256], int4[16];

  constexpr Values() : e4m3(), int4() {
    for (int i = 0; i < 256; ++i) e4m3[i] = above(bf16_of_e4m3(i & 127) | (i & 128) << 8);
    for (int i = 0; i < 16; ++i) int4[i] = above(bf16_of_nibble(i));
  }
  static constexpr float above(int bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
};
constexpr Values kValues;

// `count` depths of a quantised row, which share a scale, into every width-th of `to`.
template <Storage S>
void unpack(const Operand& x, int64_t row, int64_t depth, int64_t count, int64_t width, float* to) {
  const uint8_t* bytes = static_cast<const uint8_t*>(x.data);
  const int64_t at = row * x.row_stride + depth;
  const float scale =
      S == Storage::kFp8Block ? fp8_scale(x, row, depth) : int4_scale(x, row, depth);
  for (int64_t i = 0; i < count; ++i, to += width)
    if constexpr (S == Storage::kFp8Block)
      *to = kValues.e4m3[bytes[at + i]] * scale;
    else
      *to = kValues.int4[bytes[(at + i) >> 1] >> 4 * ((at + i) & 1) & 15] * scale;
}

template <Storage S, int64_t kGroup>
void pack_quantised(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                    int64_t width, float* to) {
  for (int64_t r = 0; r < width; ++r)
    for (int64_t d = 0, next; d < count; d = next) {
      next = std::min(count, round_up(depth + d + 1, kGroup) - depth);
      if (r < rows)
        unpack<S>(x, row + r, depth + d, next - d, width, to + d * width + r);
      else
        for (int64_t i = d; i < next; ++i) to[i * width + r] = 0.0f;
    }
}

void pack(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count, int64_t width,
          float* to) {
  if (x.storage == Storage::kFp8Block)
    return pack_quantised<Storage::kFp8Block, kFp8Block>(x, row, rows, depth, count, width, to);
  if (x.storage == Storage::kInt4Group)
    return pack_quantised<Storage::kInt4Group, kInt4Group>(x, row, rows, depth, count, width, to);
  for (int64_t d = 0; d < count; ++d)
    for (int64_t r = 0; r < width; ++r)
      to[d * width + r] = r < rows ? read_element(x, row + r, depth + d) : 0.0f;
}

void pack_panel(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                void* panel) {
  float* to = static_cast<float*>(panel);
  for (int64_t done = 0; done < count; done += kDepthBlock) {
    const int64_t block = std::min(kDepthBlock, count - done);
    for (int64_t r = 0; r < rows; r += kRows, to += block * kRows)
      pack(x, row + r, std::min(kRows, rows - r), depth + done, block, kRows, to);
  }
}

void pack_strip(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                void* strip) {
  pack(x, row, rows, depth, count, kStripRows, static_cast<float*>(strip));
}

void multiply(const void* panel, int64_t rows, const void* strip, int64_t count, const Upcoming&,
              float* c, int64_t stride, bool accumulate) {
  const float* p = static_cast<const float*>(panel);
  const float* s = static_cast<const float*>(strip);
  for (int64_t i = 0; i < rows; i += kRows, p += count * kRows)
    for (int64_t r = 0; r < std::min(kRows, rows - i); ++r) {
      float sum[kStripRows] = {};
      for (int64_t d = 0; d < count; ++d)
        for (int64_t j = 0; j < kStripRows; ++j) sum[j] += p[d * kRows + r] * s[d * kStripRows + j];
      float* to = c + (i + r) * stride;
      for (int64_t j = 0; j < kStripRows; ++j) to[j] = accumulate ? to[j] + sum[j] : sum[j];
    }
}

// Four lanes, which every processor's compiler has registers for.
struct Lanes {
  using F = float __attribute__((vector_size(16)));
  using Halves = uint16_t __attribute__((vector_size(16)));
  using Pair = int64_t __attribute__((vector_size(16)));
  using Token = float;
  static constexpr int kLanes = 4;
  static constexpr int64_t kSpan = kLanes, kPassTokens = 4, kOnePass = 4;
  static constexpr bool kScales = false;
  static constexpr bool kHoldsRows = false;  // a product without fma takes one more
  static constexpr int kRows[] = {8, 6, 4, 3};

  static F set(float x) { return F{x, x, x, x}; }
  static F zero() { return set(0.0f); }
  static F mul(F a, F b) { return a * b; }
  static F load_e4m3(const uint8_t* x) {
    const float* at = kValues.e4m3;
    return F{at[x[0]], at[x[1]], at[x[2]], at[x[3]]};
  }
  static F load_int4(const uint8_t* x) {
    const float* at = kValues.int4;
    return F{at[x[0] & 15], at[x[0] >> 4], at[x[1] & 15], at[x[1] >> 4]};
  }
  static F add(F a, F b) { return a + b; }
  static F fma(F a, F b, F sum) { return a * b + sum; }
  static F multiply_add(F a, F b, F sum) { return fma(a, b, sum); }
  // The first four become the upper halves of words: one instruction, where a conversion of four is
  // a dozen.
  static Halves above_zeros(Halves x) {
    static_assert(std::endian::native == std::endian::little);
#if defined(__clang__)
    return __builtin_shufflevector(Halves{}, x, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return __builtin_shuffle(Halves{}, x, Halves{0, 8, 1, 9, 2, 10, 3, 11});
#endif
  }
  template <class T>
  static F load(const T* x) {
    if constexpr (kDtype<T> == KIMI_FLOAT16) return some(x, kLanes);  // many instructions
    F a;
    if constexpr (kDtype<T> == KIMI_BFLOAT16) {
      int64_t four;  // in a register: memory that was written in halves would be waited for
      std::memcpy(&four, x, sizeof four);
      const Halves word = above_zeros(Halves(Pair{four, 0}));
      std::memcpy(&a, &word, sizeof a);
    } else {
      std::memcpy(&a, x, sizeof a);
    }
    return a;
  }
  template <class T>
  static F load(const T* x, int left) {
    return left >= kLanes ? load(x) : some(x, left);
  }
  template <class T>
  __attribute__((noinline)) static F some(const T* x, int left) {
    F a = zero();
    for (int l = 0; l < left && l < kLanes; ++l) a[l] = to_float(x[l]);
    return a;
  }
  static void store(float* x, F a, int left = kLanes) {
    std::memcpy(x, &a, sizeof(float) * size_t(std::min(left, kLanes)));
  }
  template <Storage S>
  static F row(const Operand& x, int64_t row, int64_t depth, int64_t n) {
    return row_of<Lanes, S>(x, row, depth, n);
  }
  static void store_sums(float* to, int n, F a, F b, F c, F d) {
    const F sums[] = {a, b, c, d};
    for (int r = 0; r < n && r < 4; ++r)
      to[r] = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
  }
};

}  // namespace

extern const BlockEngine kPortableBlocks = {kRows,      kDepthBlock,
                                            1,          4,
                                            pack_panel, pack_strip,
                                            multiply,   nullptr,
                                            24,         Lanes::kPassTokens,
                                            24,         pack_dot<Lanes>,
                                            dot<Lanes>, spread<Lanes, float, 4>};

}  // namespace kimi::cpu
