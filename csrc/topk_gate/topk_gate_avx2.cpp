// SPDX-License-Identifier: MIT
// The gate on AVX2, FMA and F16C: 8 experts a step; division is the hardware's.
#include <array>

#include "cpu/vec_avx2.h"
#include "topk_gate/topk_gate_simd.h"

namespace kimi::gate {
namespace {

// The lanes of a mask, first to last, as bytes; 0 behind them.
constexpr auto kLanesOf = [] {
  std::array<std::array<uint8_t, 8>, 256> all{};
  for (unsigned mask = 0; mask < 256; ++mask)
    for (unsigned lane = 0, at = 0; lane < 8; ++lane)
      if (mask >> lane & 1) all[mask][at++] = uint8_t(lane);
  return all;
}();

struct Avx2Gate : cpu::Avx2 {
  struct Estimates : cpu::Avx2 {
    // The reciprocal 1.5 * 2^-12, and a quarter of the 0.75e-4 that the polynomial errs, relative.
    static constexpr float kError = 0x1.9p-12f;

    // A minimax polynomial of degree 3 over [-1/2, 1/2]; 2^126 stands for all that is larger.
    static F exp2_estimate(F a) {
      const F magic = set(0x1.8p23f + 127.0f);  // its last bits become the exponent of 2^round(x)
      const F x = min(set(126.0f), max(set(-126.0f), a));
      const F shifted = add(x, magic), r = sub(x, sub(shifted, magic));
      F p = fma(r, set(0x1.c3f762p-5f), set(0x1.f0de1cp-3f));
      p = fma(r, p, set(0x1.62f31ap-1f));
      p = fma(r, p, set(0x1.fff692p-1f));
      return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
    }
    static F reciprocal_estimate(F a) { return _mm256_rcp_ps(a); }
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
  static void store_counts(int32_t* to, I count) {
    _mm256_storeu_si256(reinterpret_cast<I*>(to), count);
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
      const unsigned hit = bits(at_least(load(choice + e), least));
      const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLanesOf[hit].data()));
      _mm256_storeu_si256(reinterpret_cast<I*>(out + count),
                          _mm256_add_epi32(_mm256_cvtepu8_epi32(lanes), _mm256_set1_epi32(e)));
      count += __builtin_popcount(hit);
    }
    return count;
  }
};

}  // namespace

extern const CpuEngine kAvx2Engine = kEngine<Avx2Gate>;

}  // namespace kimi::gate
