// SPDX-License-Identifier: MIT
// The gated activations and their slopes, written once for every engine: templates over the `Ops`
// of topk_gate/score.h (vectors of floats, or one float).
#pragma once

#include "fused_experts/fused_experts.h"
#include "topk_gate/score.h"

namespace kimi::experts {

// tanh(x): an odd polynomial below 0.625, else (1 - e) / (1 + e) with e = exp(-2 |x|); within 3
// ulp.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F tanh(F x) {
  const F negative = O::neg_abs(x), square = O::mul(x, x);
  const F e = gate::exp_nonpositive<O>(O::add(negative, negative));
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
  const F tail = O::mul(O::mul(t, O::set(0.5f)),
                        gate::exp_nonpositive<O>(O::fma(O::sub(O::set(0.0f), z), z, p)));
  return O::select(O::less(x, O::set(0.0f)), O::sub(O::set(1.0f), tail), tail);
}

template <class O>
struct Gated {
  typename O::F value;       // a(g) b(u)
  typename O::F slope_gate;  // d value / dg
  typename O::F slope_up;    // d value / du
};

// With kSlopes false only the value is computed.
template <class O, kimi_activation kActivation, bool kSlopes, class F = typename O::F>
KIMI_HOST_DEVICE Gated<O> gated(F g, F u) {
  const F one = O::set(1.0f);
  if constexpr (kActivation == KIMI_ACTIVATION_GELU) {
    const F phi = half_erfc<O>(O::mul(g, O::set(-0.70710678f)));
    const F a = O::mul(g, phi);
    if constexpr (!kSlopes) return {O::mul(a, u), a, a};
    const F exponent = O::mul(O::mul(g, g), O::set(-0.5f));
    const F density = O::mul(gate::exp_nonpositive<O>(exponent), O::set(0.39894228f));
    return {O::mul(a, u), O::mul(O::fma(g, density, phi), u), a};
  } else if constexpr (kActivation == KIMI_ACTIVATION_SITU) {
    const F tg = tanh<O>(O::mul(g, O::set(1.0f / kSituGate)));
    const F tu = tanh<O>(O::mul(u, O::set(1.0f / kSituUp)));
    const F s = gate::sigmoid<O>(g), a = O::mul(O::mul(tg, O::set(kSituGate)), s);
    const F b = O::mul(tu, O::set(kSituUp));
    if constexpr (!kSlopes) return {O::mul(a, b), a, a};
    const F bent = O::mul(s, O::sub(one, O::mul(tg, tg)));  // slope of 4 tanh(g / 4), times s
    const F slope = O::fma(a, O::sub(one, s), bent);
    return {O::mul(a, b), O::mul(slope, b), O::mul(a, O::sub(one, O::mul(tu, tu)))};
  } else {
    const F s = gate::sigmoid<O>(g), a = O::mul(g, s);
    if constexpr (!kSlopes) return {O::mul(a, u), a, a};
    return {O::mul(a, u), O::mul(O::fma(a, O::sub(one, s), s), u), a};
  }
}

// visit<T, kActivation>() for the runtime dtype and activation.
template <class Visitor>
void dispatch_activation(kimi_dtype dtype, kimi_activation activation, const Visitor& visit) {
  dispatch(dtype, [&]<class T>() {
    switch (activation) {
      case KIMI_ACTIVATION_GELU:
        return visit.template operator()<T, KIMI_ACTIVATION_GELU>();
      case KIMI_ACTIVATION_SITU:
        return visit.template operator()<T, KIMI_ACTIVATION_SITU>();
      default:
        return visit.template operator()<T, KIMI_ACTIVATION_SILU>();
    }
  });
}

}  // namespace kimi::experts
