// SPDX-License-Identifier: MIT
// The gate on AVX-512 (F, BW, VL, DQ): 16 experts a step.
//
// Per token at E = 384, K = 8: 24 steps of about 15 instructions for the estimates (30 for the scores
// of other functions than the sigmoid), 24 x 3 to collect the candidates, about 150 to bound, score
// and rank them. Division would add 16 cycles a vector, so the reciprocal is refined from VRCP14PS.
#include "cpu/vec_avx512.h"
#include "topk_gate/topk_gate_simd.h"

namespace kimi::gate {
namespace {

struct Avx512Gate : cpu::Avx512 {
  struct Estimates : cpu::Avx512 {
    // The polynomial 0.75e-4 and the reciprocal 2^-14, relative: a quarter of the one and the other.
    static constexpr float kError = 0x1.8p-14f;

    // A minimax polynomial of degree 3 over [0, 1).
    static F exp2_estimate(F a) {
      const F r = _mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // a - floor(a)
      F p = fma(r, set(0x1.3f96a4p-4f), set(0x1.cefc4ep-3f));
      p = fma(r, p, set(0x1.64444ap-1f));
      return _mm512_scalef_ps(fma(r, p, set(0x1.fff632p-1f)), a);
    }
  };

  static F lowest_if(Mask m, F a) {  // -inf where m or where a is NaN
    const F lowest = set(-__builtin_inff());
    return _mm512_mask_max_ps(lowest, _knot_mask16(m), a, lowest);
  }

  // NaN from the lane `left` on.
  static F keep_first(F a, int left) {
    return left >= kLanes ? a : _mm512_mask_mov_ps(set(__builtin_nanf("")), first(left), a);
  }

  static I zero_counts() { return _mm512_setzero_si512(); }
  static I count_greater(I count, F a, F b) {
    const Mask greater = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(count, greater, count, _mm512_set1_epi32(1));
  }
  static void store_counts(int32_t* to, I count) { _mm512_storeu_si512(to, count); }
  static Mask count_below(I count, int k) {
    return _mm512_cmplt_epi32_mask(count, _mm512_set1_epi32(k));
  }

  // Lane l takes the value of lane l ^ kHalf.
  template <int kHalf>
  static F exchange(F a) {
    if constexpr (kHalf == 8) return _mm512_shuffle_f32x4(a, a, 0x4e);
    if constexpr (kHalf == 4) return _mm512_shuffle_f32x4(a, a, 0xb1);
    return _mm512_permute_ps(a, kHalf == 2 ? 0x4e : 0xb1);
  }
  static float first_lane(F a) { return _mm512_cvtss_f32(a); }

  // out = ids whose choice reaches `bound`, ascending; returns how many. It ends after the vector
  // in which they become more than `most`: out has room for most + kLanes.
  static int collect(const float* choice, int num_experts, float bound, int most, int32_t* out) {
    I ids = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const F least = set(bound);
    int count = 0;
    for (int e = 0; e < num_experts && count <= most; e += kLanes) {
      const Mask hit = _mm512_cmp_ps_mask(load(choice + e), least, _CMP_GE_OQ);
      _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(hit, ids));
      count += __builtin_popcount(hit);
      ids = _mm512_add_epi32(ids, _mm512_set1_epi32(kLanes));
    }
    return count;
  }
};

}  // namespace

extern const CpuEngine kAvx512Engine = kEngine<Avx512Gate>;

}  // namespace kimi::gate
