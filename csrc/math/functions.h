// SPDX-License-Identifier: MIT
// Functions of fp32 numbers, written once for every engine.
//
// Every function is a template over an `Ops` class (cpu/vec_*.h, device/ops.cuh): F, a float or a
// vector of floats, with add, sub, mul, fma, div, sqrt, each rounded once and never contracted,
// min, neg_abs, is_nan, less, at_least, select, exponent, significand, and
// scale_by_exponent_or_zero(c, p, m) = c ? 2^(low bits of m) p : 0. All engines therefore agree bit
// for bit, the CUDA ones included.
//
//   exp(x), x <= 0:  n = round(x log2 e), r = x - n ln 2, exp(x) = 2^n p(r); 0 below -87
//                    p: degree 6, relative error 0.05 ulp before rounding; ln 2 in one part adds
//                    0.02 n ulp, 2 ulp at the lower end
//   log1p(x), x in [0, 1]:  2 atanh(t), t = x / (2 + x), atanh(t) = t + t^3 g(t^2)
//                    g: degree 3, relative error 0.08 ulp before rounding
// Coefficients: minimax fits (Lawson's iteration) in double, rounded to fp32.
#pragma once

#include "common/dtype.h"

namespace kimi::math {

inline constexpr float kMaxFloat = 0x1.fffffep127f;

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
// engine may divide or iterate. Those that have a reciprocal_estimate() of 12 bits or more iterate,
// with subtract_product(a, b, c) = c - a b rounded once.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F reciprocal_by_division(F d) {
  return O::select(O::less(O::set(0x1.fffffcp0f), d), O::set(0.5f), O::div(O::set(1.0f), d));
}
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F reciprocal(F d) {
  if constexpr (requires { O::reciprocal_estimate(d); }) {
    const F one = O::set(1.0f), first = O::reciprocal_estimate(d);
    const F second = O::fma(first, O::subtract_product(d, first, one), first);
    const F third = O::fma(second, O::subtract_product(d, second, one), second);
    return O::select(O::less(O::set(0x1.fffffcp0f), d), O::set(0.5f), third);
  } else {
    return reciprocal_by_division<O>(d);
  }
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

// 1 / (1 + exp(-z)); e / (1 + e) for negative z keeps its relative accuracy. NaN gives 0,
// infinity 1.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F sigmoid(F z) {
  const F e = exp_nonpositive<O>(O::neg_abs(z));
  const F r = reciprocal<O>(O::add(e, O::set(1.0f)));
  return O::select(O::at_least(z, O::set(0.0f)), r, O::mul(e, r));
}

// tanh(x): an odd polynomial below 0.625, else (1 - e) / (1 + e) with e = exp(-2 |x|); within
// 3 ulp.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F tanh(F x) {
  const F negative = O::neg_abs(x), square = O::mul(x, x);
  const F e = exp_nonpositive<O>(O::add(negative, negative));
  const F large = O::div(O::sub(O::set(1.0f), e), O::add(O::set(1.0f), e));
  const F signed_large = O::select(O::less(x, O::set(0.0f)), O::sub(O::set(0.0f), large), large);
  F p = O::set(-5.70498872745e-3f);
  p = O::fma(p, square, O::set(2.06390887954e-2f));
  p = O::fma(p, square, O::set(-5.37397155531e-2f));
  p = O::fma(p, square, O::set(1.33314422036e-1f));
  p = O::fma(p, square, O::set(-3.33332819422e-1f));
  const F small = O::fma(O::mul(p, square), x, x);
  const F value = O::select(O::less(O::set(-0.625f), negative), small, signed_large);
  return O::select(O::is_nan(x), x, value);
}

// erfc(x) / 2 for any x: t exp(-x^2 + P(t)) / 2 with t = 1 / (1 + |x| / 2), relative error 1.2e-7
// (Numerical Recipes), 1 - that for negative x.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F half_erfc(F x) {
  const F z = O::sub(O::set(0.0f), O::neg_abs(x));
  const F t = O::div(O::set(1.0f), O::fma(z, O::set(0.5f), O::set(1.0f)));
  F p = O::set(0.17087277f);
  p = O::fma(p, t, O::set(-0.82215223f));
  p = O::fma(p, t, O::set(1.48851587f));
  p = O::fma(p, t, O::set(-1.13520398f));
  p = O::fma(p, t, O::set(0.27886807f));
  p = O::fma(p, t, O::set(-0.18628806f));
  p = O::fma(p, t, O::set(0.09678418f));
  p = O::fma(p, t, O::set(0.37409196f));
  p = O::fma(p, t, O::set(1.00002368f));
  p = O::fma(p, t, O::set(-1.26551223f));
  const F tail =
      O::mul(O::mul(t, O::set(0.5f)), exp_nonpositive<O>(O::fma(O::sub(O::set(0.0f), z), z, p)));
  return O::select(O::less(x, O::set(0.0f)), O::sub(O::set(1.0f), tail), tail);
}

}  // namespace kimi::math
