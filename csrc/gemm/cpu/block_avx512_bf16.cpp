// SPDX-License-Identifier: MIT
// Block products of bf16 pairs (vdpbf16ps): tiles of 14 x 32 as in fp32, each instruction two
// depths. The processor flushes subnormal products and sums to zero.
#include "gemm/cpu/block_dot_avx512.h"
#include "gemm/cpu/block_pack_avx512.h"
#include "gemm/cpu/block_pairs_avx512_bf16.h"
#include "gemm/cpu/block_simd.h"

namespace kimi::cpu {
namespace {

struct Avx512Bf16 {
  using V = __m512;
  using Pack = uint32_t;  // a pair
  static constexpr int64_t kRows = 14, kLanes = 16, kPair = 2;

  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* x) { return _mm512_loadu_ps(x); }
  static __m512bh load_pack(const uint32_t* x) { return (__m512bh)_mm512_loadu_si512(x); }
  static __m512bh broadcast(const uint32_t* x) { return (__m512bh)_mm512_set1_epi32(int(*x)); }
  static V multiply_add(__m512bh a, __m512bh b, V sum) { return _mm512_dpbf16_ps(sum, a, b); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static void store(float* x, V a) { _mm512_storeu_ps(x, a); }
  static void prefetch(const char* x) { _mm_prefetch(x, _MM_HINT_T1); }
};

constexpr int64_t kDepthBlock = 512;

}  // namespace

extern const BlockEngine kAvx512Bf16Blocks = {Avx512Bf16::kRows,
                                              kDepthBlock,
                                              2,
                                              2,
                                              pack<Pairs, Avx512Bf16::kRows, kDepthBlock, 2>,
                                              pack<Pairs, kStripRows, kDepthBlock, 2>,
                                              multiply<Avx512Bf16>,
                                              nullptr,
                                              kDotTokens,
                                              kPassTokens,
                                              pack_dot<DotPairs>,
                                              dot<DotPairs>};

}  // namespace kimi::cpu
