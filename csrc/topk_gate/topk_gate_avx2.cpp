// SPDX-License-Identifier: MIT
// The gate on AVX2, FMA and F16C: 8 experts a step; division is the hardware's.
#include "cpu/vec_avx2.h"
#include "topk_gate/topk_gate_simd.h"

namespace kimi::gate {
namespace {

struct Avx2Gate : cpu::Avx2 {
  struct Estimates : cpu::Avx2 {
    // A quarter of what the polynomial errs, 0.75e-4 relative; the reciprocal 3 * 2^-24 and a little.
    static constexpr float kError = 0x1.8p-16f;

    // A minimax polynomial of degree 3 over [-1/2, 1/2]; 2^126 stands for all that is larger.
    static F exp2_estimate(F a) {
      const F magic = set(0x1.8p23f);
      const F x = min(set(126.0f), max(set(-126.0f), a));
      const F shifted = add(x, magic), r = sub(x, sub(shifted, magic));
      F p = fma(r, set(0x1.c3f762p-5f), set(0x1.f0de1cp-3f));
      p = fma(r, p, set(0x1.62f31ap-1f));
      p = fma(r, p, set(0x1.fff692p-1f));
      const I exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
      const I scaled = _mm256_add_epi32(_mm256_castps_si256(p), exponent);
      return select(is_nan(a), a, _mm256_castsi256_ps(scaled));
    }
    static F reciprocal_estimate(F a) {  // 12 bits and a step of Newton's
      const F first = _mm256_rcp_ps(a);
      return fma(first, _mm256_fnmadd_ps(a, first, set(1.0f)), first);
    }
  };

  static F lowest_if(Mask mask, F a) {  // -inf where mask or where a is NaN
    const F lowest = set(-__builtin_inff());
    return select(mask, lowest, _mm256_max_ps(a, lowest));
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
  static Mask count_below(I count, int k) {
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(k), count));
  }

  // Lane l takes the value of lane l ^ kHalf.
  template <int kHalf>
  static F exchange(F a) {
    if constexpr (kHalf == 4) return _mm256_permute2f128_ps(a, a, 1);
    return _mm256_permute_ps(a, kHalf == 2 ? 0x4e : 0xb1);
  }
  static float first_lane(F a) { return _mm256_cvtss_f32(a); }

  // out = ids whose choice reaches `bound`, ascending; returns how many. It ends after the vector
  // in which they become more than `most`: out has room for most + kLanes.
  static int collect(const float* choice, int num_experts, float bound, int most, int32_t* out) {
    const F least = set(bound);
    int count = 0;
    for (int e = 0; e < num_experts && count <= most; e += kLanes) {
      const Mask hit = _mm256_cmp_ps(load(choice + e), least, _CMP_GE_OQ);
      for (unsigned lanes = bits(hit); lanes; lanes &= lanes - 1)
        out[count++] = e + __builtin_ctz(lanes);
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

extern const CpuEngine kAvx2Engine = kEngine<Avx2Gate>;

}  // namespace kimi::gate
