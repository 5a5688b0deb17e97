// SPDX-License-Identifier: MIT
// Block products on AVX-512 in fp32: tiles of 14 x 32, 28 of 32 registers hold sums. A strip of 256
// depths is 32 KiB, the group of the panel beside it 14 KiB; both stay in L1 and L2.
#include "gemm/cpu/block_dot_avx512.h"
#include "gemm/cpu/block_pack_avx512.h"
#include "gemm/cpu/block_simd.h"

namespace kimi::cpu {
namespace {

struct Avx512 {
  using V = __m512;
  using Pack = float;
  static constexpr int64_t kRows = 14, kLanes = 16, kPair = 1;

  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* x) { return _mm512_loadu_ps(x); }
  static V load_pack(const float* x) { return _mm512_loadu_ps(x); }
  static V broadcast(const float* x) { return _mm512_set1_ps(*x); }
  static V multiply_add(V a, V b, V sum) { return _mm512_fmadd_ps(a, b, sum); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static void store(float* x, V a) { _mm512_storeu_ps(x, a); }
  static void prefetch(const char* x) { _mm_prefetch(x, _MM_HINT_T1); }
};

constexpr int64_t kDepthBlock = 256;

// Depths of one row as a vector of the compute type, for dot products.
struct DotFloat32 {
  using Token = float;
  static constexpr int64_t kSpan = 16;

  static __m512 load(const float* x) { return _mm512_loadu_ps(x); }
  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
  template <Storage S>
  static __m512 row(const Operand& x, int64_t row, int64_t depth, int64_t n) {
    return row16<S>(x, row, depth, n);
  }
};

}  // namespace

extern const BlockEngine kAvx512Blocks = {Avx512::kRows,
                                          kDepthBlock,
                                          1,
                                          4,
                                          pack<Float32, Avx512::kRows, kDepthBlock, 1>,
                                          pack<Float32, kStripRows, kDepthBlock, 1>,
                                          multiply<Avx512>,
                                          nullptr,
                                          kDotTokens,
                                          kPassTokens,
                                          pack_dot<DotFloat32>,
                                          dot<DotFloat32>};

}  // namespace kimi::cpu
