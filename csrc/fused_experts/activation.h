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
KIMI_HOST_DEVICE Gated<O> gated(F g, F u, const Activation& activation) {
  [[maybe_unused]] const kimi_activation_numbers& n = activation.numbers;
  const F one = O::set(1.0f);
  if constexpr (kActivation == KIMI_ACTIVATION_GELU) {
    const F phi = math::half_erfc<O>(O::mul(g, O::set(-0.70710678f)));
    const F a = O::mul(g, phi);
    if constexpr (!kSlopes) return {O::mul(a, u), a, a};
    const F exponent = O::mul(O::mul(g, g), O::set(-0.5f));
    const F density = O::mul(math::exp_nonpositive<O>(exponent), O::set(0.39894228f));
    return {O::mul(a, u), O::mul(O::fma(g, density, phi), u), a};
  } else if constexpr (kActivation == KIMI_ACTIVATION_SITU) {
    const F tg = math::tanh<O>(O::mul(g, O::set(activation.gate_factor)));
    const F s = math::sigmoid<O>(g), a = O::mul(O::mul(tg, O::set(n.gate_bound)), s);
    F b = u, up_slope = one;
    if (activation.up_factor != 0.0f) {
      const F tu = math::tanh<O>(O::mul(u, O::set(activation.up_factor)));
      b = O::mul(tu, O::set(n.up_bound));
      up_slope = O::sub(one, O::mul(tu, tu));
    }
    if constexpr (!kSlopes) return {O::mul(a, b), a, a};
    const F bent = O::mul(s, O::sub(one, O::mul(tg, tg)));  // slope of B tanh(g / B), times s
    const F slope = O::fma(a, O::sub(one, s), bent);
    return {O::mul(a, b), O::mul(slope, b), O::mul(a, up_slope)};
  } else if constexpr (kActivation == KIMI_ACTIVATION_GELU_TANH) {
    constexpr float kTwice = 1.59576912f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
    const F scaled = O::mul(g, O::set(kTwice)), square = O::mul(g, g);
    const F s = math::sigmoid<O>(O::mul(scaled, O::fma(square, O::set(kCubic), one)));
    const F a = O::mul(g, s);
    if constexpr (!kSlopes) return {O::mul(a, u), a, a};
    const F inner = O::mul(scaled, O::fma(square, O::set(3 * kCubic), one));  // g times its slope
    return {O::mul(a, u), O::mul(O::fma(O::mul(s, O::sub(one, s)), inner, s), u), a};
  } else if constexpr (kActivation == KIMI_ACTIVATION_RELU2) {
    const F positive = O::max(O::set(0.0f), g), a = O::mul(positive, positive);  // NaN stays
    if constexpr (!kSlopes) return {O::mul(a, u), a, a};
    return {O::mul(a, u), O::mul(O::add(positive, positive), u), a};
  } else if constexpr (kActivation == KIMI_ACTIVATION_SWIGLU) {
    // The limits as second arguments would lose a NaN. A slope at a limit is that within.
    const F zero = O::set(0.0f), gate_limit = O::set(n.gate_limit),
            silu_limit = O::set(n.silu_limit), up_limit = O::set(n.up_limit);
    const F c = O::min(gate_limit, g), alpha = O::set(n.alpha);
    const F s = math::sigmoid<O>(O::mul(alpha, c)), whole = O::mul(c, s);
    const F a = O::min(silu_limit, whole);
    const F b = O::add(O::max(O::set(-n.up_limit), O::min(up_limit, u)), O::set(n.shift));
    if constexpr (!kSlopes) return {O::mul(a, b), a, a};
    F slope = O::fma(O::mul(alpha, whole), O::sub(one, s), s);
    slope = O::select(O::either(O::less(gate_limit, g), O::less(silu_limit, whole)), zero, slope);
    const F up_slope = O::select(O::less(up_limit, O::abs(u)), zero, a);
    return {O::mul(a, b), O::mul(slope, b), up_slope};
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
      case KIMI_ACTIVATION_GELU_TANH:
        return visit.template operator()<T, KIMI_ACTIVATION_GELU_TANH>();
      case KIMI_ACTIVATION_RELU2:
        return visit.template operator()<T, KIMI_ACTIVATION_RELU2>();
      case KIMI_ACTIVATION_SWIGLU:
        return visit.template operator()<T, KIMI_ACTIVATION_SWIGLU>();
      default:
        return visit.template operator()<T, KIMI_ACTIVATION_SILU>();
    }
  });
}

}  // namespace kimi::experts
