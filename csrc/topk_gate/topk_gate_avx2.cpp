// SPDX-License-Identifier: MIT
// The gate on AVX2, FMA and F16C: 8 experts a step; division is the hardware's.
#include <immintrin.h>

#include "topk_gate/topk_gate_simd.h"

namespace kimi::gate {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int kLanes = 8;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F neg_abs(F a) { return _mm256_or_ps(a, set(-0.0f)); }
  static F min_finite(F a) { return _mm256_min_ps(a, set(kMaxFloat)); }
  static F is_nan(F a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static F less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static F select(F mask, F a, F b) { return _mm256_blendv_ps(b, a, mask); }
  static F scale_by_exponent_or_zero(F keep, F p, F shifted) {
    const I exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    const I scaled = _mm256_add_epi32(_mm256_castps_si256(p), exponent);
    return _mm256_and_ps(keep, _mm256_castsi256_ps(scaled));
  }
  static F reciprocal(F d) { return reciprocal_by_division<Avx2>(d); }
  static F zero_if(F mask, F a) { return _mm256_andnot_ps(mask, a); }
  static F lowest_if(F mask, F a) {  // -inf where mask or where a is NaN
    const F lowest = set(-__builtin_inff());
    return select(mask, lowest, _mm256_max_ps(a, lowest));
  }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static float reduce_max(F a) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, a);
    for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
  }

  static float reduce_min(F a) { return -reduce_max(_mm256_xor_ps(a, set(-0.0f))); }

  static I first(int left) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m128i load_halves(const void* x, int left) {
    if (left >= kLanes) return _mm_loadu_si128(static_cast<const __m128i*>(x));
    alignas(16) uint16_t lanes[kLanes] = {};
    memcpy(lanes, x, sizeof(uint16_t) * left);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
  }
  static F load_all(const float* x) { return _mm256_loadu_ps(x); }
  static F load(const float* x, int left) {
    return left >= kLanes ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, first(left));
  }
  static F load(const bf16* x, int left) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(x, left)), 16));
  }
  static F load(const fp16* x, int left) { return _mm256_cvtph_ps(load_halves(x, left)); }
  template <class T>
  static F load_or(const T* x, int left, float other) {
    return select(_mm256_castsi256_ps(first(left)), load(x, left), set(other));
  }
  static void store(float* x, F a) { _mm256_storeu_ps(x, a); }
  template <class T>
  static void store_as(T* x, int left, F a) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, a);
    for (int i = 0; i < kLanes && i < left; ++i) x[i] = from_float<T>(lanes[i]);
  }

  // NaN from the lane `left` on.
  static F keep_first(F a, int left) {
    const F nan = set(__builtin_nanf(""));
    return left >= kLanes ? a : select(_mm256_castsi256_ps(first(left)), a, nan);
  }

  static I zero_counts() { return _mm256_setzero_si256(); }
  static I count_greater(I count, F a, F b) {
    return _mm256_sub_epi32(count, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static F count_below(I count, int k) {
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(k), count));
  }

  // out = ids whose choice reaches `bound`, ascending; returns how many.
  static int collect(const float* choice, int num_experts, float bound, int32_t* out) {
    const F least = set(bound);
    int count = 0;
    for (int e = 0; e < num_experts; e += kLanes) {
      const F hit = _mm256_cmp_ps(load_all(choice + e), least, _CMP_GE_OQ);
      for (unsigned bits = unsigned(_mm256_movemask_ps(hit)); bits; bits &= bits - 1)
        out[count++] = e + __builtin_ctz(bits);
    }
    return count;
  }

  // (sort_key, ~id) as one signed number: greater is better, and no two are equal.
  static void order_keys(const float* choice, const int32_t* ids, int count, int64_t* order) {
    for (int i = 0; i < count; ++i)
      order[i] = int64_t(uint64_t(uint32_t(sort_key(choice[ids[i]]))) << 32 | uint32_t(~ids[i]));
  }

  static void rank_descending(const int64_t* order, int count, int32_t* rank) {
    for (int i = 0; i < count; i += 4) {
      const I mine = _mm256_load_si256(reinterpret_cast<const __m256i*>(order + i));
      I better = _mm256_setzero_si256();
      for (int j = 0; j < count; ++j)
        better = _mm256_sub_epi64(better, _mm256_cmpgt_epi64(_mm256_set1_epi64x(order[j]), mine));
      alignas(32) int64_t lanes[4];
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), better);
      for (int l = 0; l < 4; ++l) rank[i + l] = int32_t(lanes[l]);
    }
  }
};

}  // namespace

extern const CpuEngine kAvx2Engine = {forward<Avx2>, backward<Avx2>};

}  // namespace kimi::gate
