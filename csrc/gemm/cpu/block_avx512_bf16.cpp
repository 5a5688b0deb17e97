// SPDX-License-Identifier: MIT
// Block products of bf16 pairs (vdpbf16ps): tiles of 14 x 32 as in fp32, each instruction two
// depths. The processor flushes subnormal products and sums to zero.
#include "cpu/vec_avx512.h"
#include "gemm/cpu/block_dot_avx512.h"
#include "gemm/cpu/block_pack_avx512.h"
#include "gemm/cpu/block_pairs_avx512_bf16.h"
#include "gemm/cpu/block_simd.h"

namespace kimi::cpu {
namespace {

struct Tile : Avx512 {
  using Pack = uint32_t;  // a pair
  static constexpr int64_t kRows = 14, kPair = 2;

  static __m512bh load_pack(const uint32_t* x) { return (__m512bh)_mm512_loadu_si512(x); }
  static __m512bh broadcast(const uint32_t* x) { return (__m512bh)_mm512_set1_epi32(int(*x)); }
  static F multiply_add(__m512bh a, __m512bh b, F sum) { return _mm512_dpbf16_ps(sum, a, b); }
};

constexpr int64_t kDepthBlock = 512;

}  // namespace

extern const BlockEngine kAvx512Bf16Blocks = {Tile::kRows,
                                              kDepthBlock,
                                              2,
                                              2,
                                              pack<Pairs, Tile::kRows, kDepthBlock, 2>,
                                              pack<Pairs, kStripRows, kDepthBlock, 2>,
                                              multiply<Tile>,
                                              nullptr,
                                              kDotTokens,
                                              kDotQuantised,
                                              kSpreadTokens,
                                              pack_dot<DotPairs>,
                                              dot<DotPairs>,
                                              spread<Avx512, bf16, 8>,
                                              true};

}  // namespace kimi::cpu
