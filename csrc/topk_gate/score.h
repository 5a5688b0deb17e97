// SPDX-License-Identifier: MIT
// The scores of the gate and its losses, written once for every engine: templates over the `Ops` of
// math/functions.h. All engines agree bit for bit: the selection cannot depend on where it ran.
#pragma once

#include "math/functions.h"

namespace kimi::gate {

using math::kMaxFloat;

// A NaN logit counts as -inf, +inf as the largest finite number.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F clean(F z) {
  return O::min(O::select(O::is_nan(z), O::set(-__builtin_inff()), z), O::set(kMaxFloat));
}

// s = sigmoid(z), which needs no clean(): NaN scores 0 and infinity 1 as they are, and so are their
// slopes 0.
// s = sqrt(log(1 + exp(z)))
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F sqrtsoftplus(F z) {
  const F tail = math::log1p_unit<O>(math::exp_nonpositive<O>(O::neg_abs(z)));
  const F positive = O::select(O::less(z, O::set(0.0f)), O::set(0.0f), z);
  return O::sqrt(O::add(positive, tail));
}

// Softmax of a row: exp(z - peak) here, summed in a fixed order (32 partial sums by id % 32, in
// ascending id; then partial l plus partial l^16, l^8, l^4, l^2, l^1), times one reciprocal.
// `peak` is the row's maximum clamped to finite numbers, so that z - peak is never NaN.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F softmax_numerator(F z, F peak) {
  return math::exp_nonpositive<O>(O::sub(z, peak));
}

// d sigmoid / dz = e / (1 + e)^2 with e = exp(-|z|): exact where s is close to 1.
// d sqrtsoftplus / dz = sigmoid(z) / (2 s), 0 where s is 0.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F sigmoid_slope(F z, F /*s*/) {
  const F e = math::exp_nonpositive<O>(O::neg_abs(z));
  const F r = math::reciprocal<O>(O::add(e, O::set(1.0f)));
  return O::mul(O::mul(e, r), r);
}
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F sqrtsoftplus_slope(F z, F s) {
  const F slope = O::div(math::sigmoid<O>(z), O::add(s, s));
  return O::select(O::less(O::set(0.0f), s), slope, O::set(0.0f));
}

// weights [K] from the scores that they hold, on a CPU: D is summed in slot order.
template <class O, class Params>
void weigh(const Params& p, float* weights) {
  float total = 0.0f;
  for (int j = 0; j < p.top_k; ++j) total += weights[j];
  const float scale =
      p.renormalize ? p.scaling_factor / (total + KIMI_TOPK_GATE_EPSILON) : p.scaling_factor;
  for (int j = 0; j < p.top_k; ++j) weights[j] *= scale;
}

// Ascending in x, with -0 equal to +0 and NaN lowest (as -inf); kExcluded is below every key.
inline constexpr int32_t kExcluded = INT32_MIN;
KIMI_HOST_DEVICE int32_t sort_key(float x) {
  const int32_t i = int32_t(bits_of((x == x ? x : -__builtin_inff()) + 0.0f));
  return i ^ ((i >> 31) & 0x7fffffff);
}
// The inverse of sort_key on keys.
KIMI_HOST_DEVICE float value_of_key(int32_t key) {
  return float_of(uint32_t(key ^ ((key >> 31) & 0x7fffffff)));
}

}  // namespace kimi::gate
