// SPDX-License-Identifier: MIT
// The gated activations and their slopes, written once for every engine: templates over the `Ops`
// of math/functions.h (vectors of floats, or one float).
#pragma once

#include "fused_experts/fused_experts.h"
#include "math/functions.h"

namespace kimi::experts {

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
    const F phi = math::half_erfc<O>(O::mul(g, O::set(-0.70710678f)));
    const F a = O::mul(g, phi);
    if constexpr (!kSlopes) return {O::mul(a, u), a, a};
    const F exponent = O::mul(O::mul(g, g), O::set(-0.5f));
    const F density = O::mul(math::exp_nonpositive<O>(exponent), O::set(0.39894228f));
    return {O::mul(a, u), O::mul(O::fma(g, density, phi), u), a};
  } else if constexpr (kActivation == KIMI_ACTIVATION_SITU) {
    const F tg = math::tanh<O>(O::mul(g, O::set(1.0f / kSituGate)));
    const F tu = math::tanh<O>(O::mul(u, O::set(1.0f / kSituUp)));
    const F s = math::sigmoid<O>(g), a = O::mul(O::mul(tg, O::set(kSituGate)), s);
    const F b = O::mul(tu, O::set(kSituUp));
    if constexpr (!kSlopes) return {O::mul(a, b), a, a};
    const F bent = O::mul(s, O::sub(one, O::mul(tg, tg)));  // slope of 4 tanh(g / 4), times s
    const F slope = O::fma(a, O::sub(one, s), bent);
    return {O::mul(a, b), O::mul(slope, b), O::mul(a, O::sub(one, O::mul(tu, tu)))};
  } else {
    const F s = math::sigmoid<O>(g), a = O::mul(g, s);
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
