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

  // (sort_key, ~id) as one signed number: greater is better, and no two are equal.
  static void order_keys(const float* choice, const int32_t* ids, int count, int64_t* order) {
    for (int i = 0; i < count; i += kLanes) {
      const I id = _mm512_loadu_si512(ids + i);
      const F c = _mm512_mask_i32gather_ps(set(0.0f), first(count - i), id, choice, 4);
      const I bits = _mm512_castps_si512(add(c, set(0.0f)));
      const I flip = _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1);
      const I key = _mm512_xor_si512(bits, flip), low = _mm512_xor_si512(id, _mm512_set1_epi32(-1));
      _mm512_store_si512(order + i, join(_mm512_castsi512_si256(key), _mm512_castsi512_si256(low)));
      _mm512_store_si512(order + i + 8, join(_mm512_extracti64x4_epi64(key, 1),
                                             _mm512_extracti64x4_epi64(low, 1)));
    }
  }
  static I join(__m256i high, __m256i low) {
    const I shifted = _mm512_slli_epi64(_mm512_cvtepi32_epi64(high), 32);
    return _mm512_or_si512(shifted, _mm512_cvtepu32_epi64(low));
  }

  static void rank_descending(const int64_t* order, int count, int32_t* rank) {
    for (int i = 0; i < count; i += 8) {
      const I mine = _mm512_load_si512(order + i);
      I better = _mm512_setzero_si512();
      for (int j = 0; j < count; ++j) {
        const __mmask8 greater = _mm512_cmpgt_epi64_mask(_mm512_set1_epi64(order[j]), mine);
        better = _mm512_mask_add_epi64(better, greater, better, _mm512_set1_epi64(1));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rank + i), _mm512_cvtepi64_epi32(better));
    }
  }
};

}  // namespace

extern const CpuEngine kAvx512Engine = kEngine<Avx512Gate>;

}  // namespace kimi::gate
