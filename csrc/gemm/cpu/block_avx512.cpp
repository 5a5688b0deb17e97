// SPDX-License-Identifier: MIT
// Block products on AVX-512 in fp32: tiles of 14 x 32, 28 of 32 registers hold sums. A strip of 256
// depths is 32 KiB, the group of the panel beside it 14 KiB; both stay in L1 and L2.
#include "cpu/vec_avx512.h"
#include "gemm/cpu/block_dot_avx512.h"
#include "gemm/cpu/block_pack_avx512.h"
#include "gemm/cpu/block_simd.h"

namespace kimi::cpu {
namespace {

struct Tile : Avx512 {
  using Pack = float;
  static constexpr int64_t kRows = 14, kPair = 1;

  static F load_pack(const float* x) { return load(x); }
  static F broadcast(const float* x) { return set(*x); }
  static F multiply_add(F a, F b, F sum) { return fma(a, b, sum); }
};

constexpr int64_t kDepthBlock = 256;

// Depths of one row as a vector of the compute type, for dot products.
struct DotFloat32 : DotSums {
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

extern const BlockEngine kAvx512Blocks = {Tile::kRows,
                                          kDepthBlock,
                                          1,
                                          4,
                                          pack<Float32, Tile::kRows, kDepthBlock, 1>,
                                          pack<Float32, kStripRows, kDepthBlock, 1>,
                                          multiply<Tile>,
                                          nullptr,
                                          kDotTokens,
                                          DotSums::kPassTokens,
                                          kSpreadTokens,
                                          pack_dot<DotFloat32>,
                                          dot<DotFloat32>,
                                          spread<Avx512, float, 8>};

}  // namespace kimi::cpu
