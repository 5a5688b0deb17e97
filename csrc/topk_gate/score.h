// SPDX-License-Identifier: MIT
// The fp32 mathematics of the gate and its losses, written once for every engine.
//
// Every function is a template over an `Ops` class: F (a float or a vector of floats) with add,
// sub, mul, fma, div, sqrt, each rounded once and never contracted, reciprocal (see below),
// neg_abs, min_finite, is_nan, less, at_least, select, exponent, significand, and
// scale_by_exponent_or_zero(c, p, m) = c ? 2^(low bits of m) p : 0. All engines therefore agree bit
// for bit, the CUDA ones included: the selection cannot depend on where it ran.
//
//   exp(x), x <= 0:  n = round(x log2 e), r = x - n ln 2, exp(x) = 2^n p(r); 0 below -87
//                    p: degree 6, relative error 0.05 ulp before rounding; ln 2 in one part adds
//                    0.02 n ulp, 2 ulp at the lower end
//   log1p(x), x in [0, 1]:  2 atanh(t), t = x / (2 + x), atanh(t) = t + t^3 g(t^2)
//                    g: degree 3, relative error 0.08 ulp before rounding
// Coefficients: minimax fits (Lawson's iteration) in double, rounded to fp32.
#pragma once

#include "common/dtype.h"

namespace kimi::gate {

template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F exp_nonpositive(F x) {
  const F magic = O::set(0x1.8p23f);  // adding it rounds to an integer, kept in the low bits
  const F shifted = O::fma(x, O::set(0x1.715476p0f), magic);
  const F r = O::fma(O::sub(shifted, magic), O::set(-0x1.62e43p-1f), x);
  F p = O::set(0x1.6a234ep-10f);
  p = O::fma(p, r, O::set(0x1.123a6cp-7f));
  p = O::fma(p, r, O::set(0x1.5558f4p-5f));
  p = O::fma(p, r, O::set(0x1.55549p-3f));
  p = O::fma(p, r, O::set(0x1.fffffcp-2f));
  p = O::fma(p, r, O::set(1.0f));
  p = O::fma(p, r, O::set(1.0f));
  return O::scale_by_exponent_or_zero(O::less(O::set(-87.0f), x), p, shifted);
}

// 1 / d for d in [1, 2], correctly rounded but for d = 2 - 2^-23, where it is 1/2. For that d alone
// two Newton steps end on either side of the tie, as their first estimate goes; with it fixed an
// engine may divide or iterate.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F reciprocal_by_division(F d) {
  return O::select(O::less(O::set(0x1.fffffcp0f), d), O::set(0.5f), O::div(O::set(1.0f), d));
}

template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F log1p_unit(F x) {
  const F t = O::div(x, O::add(x, O::set(2.0f)));
  const F u = O::mul(t, t);
  F g = O::set(0.14006422f);
  g = O::fma(g, u, O::set(0.14000814f));
  g = O::fma(g, u, O::set(0.2001077f));
  g = O::fma(g, u, O::set(0.3333321f));
  const F twice = O::add(t, t);
  return O::fma(O::mul(twice, u), g, twice);
}

// log(x) for x in [1, 2^24]: exponent ln 2 + log1p(significand - 1), within 1 ulp.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F log_at_least_one(F x) {
  const F fraction = log1p_unit<O>(O::sub(O::significand(x), O::set(1.0f)));
  return O::fma(O::exponent(x), O::set(0x1.62e43p-1f), fraction);
}

// A NaN logit counts as -inf, +inf as the largest finite number.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F clean(F z) {
  return O::min_finite(O::select(O::is_nan(z), O::set(-__builtin_inff()), z));
}

// s = 1 / (1 + exp(-z)); e / (1 + e) for negative z keeps its relative accuracy. Needs no clean():
// NaN scores 0 and infinity 1 as they are, and so are their slopes 0.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F sigmoid(F z) {
  const F e = exp_nonpositive<O>(O::neg_abs(z));
  const F r = O::reciprocal(O::add(e, O::set(1.0f)));
  return O::select(O::at_least(z, O::set(0.0f)), r, O::mul(e, r));
}

// s = sqrt(log(1 + exp(z)))
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F sqrtsoftplus(F z) {
  const F tail = log1p_unit<O>(exp_nonpositive<O>(O::neg_abs(z)));
  const F positive = O::select(O::less(z, O::set(0.0f)), O::set(0.0f), z);
  return O::sqrt(O::add(positive, tail));
}

// Softmax of a row: exp(z - peak) here, summed in a fixed order (32 partial sums by id % 32, in
// ascending id; then partial l plus partial l^16, l^8, l^4, l^2, l^1), times one reciprocal.
// `peak` is the row's maximum clamped to finite numbers, so that z - peak is never NaN.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F softmax_numerator(F z, F peak) {
  return exp_nonpositive<O>(O::sub(z, peak));
}

// d sigmoid / dz = e / (1 + e)^2 with e = exp(-|z|): exact where s is close to 1.
// d sqrtsoftplus / dz = sigmoid(z) / (2 s), 0 where s is 0.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F sigmoid_slope(F z, F /*s*/) {
  const F e = exp_nonpositive<O>(O::neg_abs(z));
  const F r = O::reciprocal(O::add(e, O::set(1.0f)));
  return O::mul(O::mul(e, r), r);
}
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F sqrtsoftplus_slope(F z, F s) {
  const F slope = O::div(sigmoid<O>(z), O::add(s, s));
  return O::select(O::less(O::set(0.0f), s), slope, O::set(0.0f));
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
