// SPDX-License-Identifier: MIT
// The gate's filter: estimates of the choice scores say which experts are worth an exact one. They
// decide what is looked at, never the result.
//
//   a[e]   estimate of the choice score c[e] (topk_gate.h) with |a - c| <= error * m(a),
//          m(x) = max(1, |x|)
//   tau    any number that K estimates or more reach, of 32 lane maxima the K-th largest, say
//   then   {e : a[e] >= candidates_from(tau, error)} holds the K largest c and all that tie with
//          the K-th
//
// Why: x - error m(x) and x + error m(x) rise with x. So K experts have c >= tau - error m(tau), and
// the K-th largest c and all that tie with it are no smaller. An expert with so large a c has
// a + error m(a) >= tau - error m(tau); and for a = tau - d it is a + error m(a) <= tau - d +
// error (m(tau) + d), so that d <= 2 error m(tau) / (1 - error). candidates_from() takes
// d = 2.5 error m(tau), which leaves more than the three roundings of its own for any error of
// 2^-21 to 2^-4. A NaN is no candidate; neither is anything where tau is NaN or infinite above.
#pragma once

#include "math/functions.h"

namespace kimi::gate {

// The least estimate of a candidate.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F candidates_from(F tau, float error) {
  const F size = O::max(O::abs(tau), O::set(1.0f));
  return O::fma(size, O::set(-2.5f * error), tau);
}

// ---- sigmoid from estimates of 2^x and of 1 / x --------------------------------------------------
//
// s = 1 / (1 + e), e = exp(-z); what shifts e by a relative d shifts s by s (1 - s) d, at most d / 4:
//   z log2 e    the constant and the product, 1.25 * 2^-24 relative, shift the result by
//               |z| as much; |z| s (1 - s) <= 0.224                                      0.3 * 2^-24
//   2^x         2^-22 relative (ex2.approx says so; results below 2^-126 may be 0)         1 * 2^-24
//   1 + e       one rounding, s relative                                                   1 * 2^-24
//   1 / x       2^-22 relative, one unit in the last place (rcp.approx)                    4 * 2^-24
// The exact score differs from s by at most 3 * 2^-24 (math/functions.h), and both choices are
// rounded once behind the bias: 2^-24 m(a) each and a little. In all less than 12 * 2^-24 m(a), and
// kSigmoidError is 20 * 2^-24.
inline constexpr float kSigmoidError = 0x1.4p-20f;

// Without cleaning: infinite logits give 0 and 1, NaN gives NaN.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F sigmoid_estimate(F z) {
  const F e = O::exp2_estimate(O::mul(z, O::set(-0x1.715476p0f)));
  return O::reciprocal_estimate(O::add(e, O::set(1.0f)));
}

}  // namespace kimi::gate
