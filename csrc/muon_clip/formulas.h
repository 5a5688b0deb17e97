// SPDX-License-Identifier: MIT
// What the passes do with an element, over the classes of math/functions.h: every engine, CUDA too,
// computes with these.
#pragma once

#include "common/dtype.h"

namespace kimi::muon_clip_math {

// a + weight (b - a) as fma(factor, b - a, from_end ? b : a).
struct Lerp {
  float factor;
  bool from_end;
};
KIMI_HOST_DEVICE Lerp lerp_by(double weight) {
  return {weight < 0.5 ? float(weight) : float(weight) - 1.0f, weight >= 0.5};
}

struct Momentum {
  Lerp move, look_ahead;
  float sign;  // -1: maximize
  bool nesterov;
};
struct Decay {
  float keep;  // 1 - decay
  bool cautious;
};
struct Moments {
  Lerp first;
  float beta2, one_less_beta2, root_of_correction, eps, step;
  float scale;  // of the gradient; negative: maximize
  Decay decay;
};

template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F lerp(const Lerp& l, F a, F b) {
  return O::fma(O::set(l.factor), O::sub(b, a), l.from_end ? b : a);
}

// Moves the buffer; the update.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F momentum_of(const Momentum& m, F grad, F& buffer) {
  const F g = O::mul(O::set(m.sign), grad);
  buffer = lerp<O>(m.move, buffer, g);
  return m.nesterov ? lerp<O>(m.look_ahead, g, buffer) : buffer;
}

template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F decayed(const Decay& d, F param, F direction) {
  const F less = O::mul(param, O::set(d.keep));
  if (!d.cautious) return less;
  return O::select(O::less(O::set(0.0f), O::mul(direction, param)), less, param);
}

template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F updated(const Decay& d, float rate, F param, F direction) {
  return O::fma(O::set(-rate), direction, decayed<O>(d, param, direction));
}

// Moves the moments; the parameter.
template <class O, class F = typename O::F>
KIMI_HOST_DEVICE F adamw_of(const Moments& m, F param, F grad, F& first, F& second) {
  const F g = O::mul(O::set(m.scale), grad);
  first = lerp<O>(m.first, first, g);
  second = O::fma(O::mul(O::set(m.one_less_beta2), g), g, O::mul(second, O::set(m.beta2)));
  const F root = O::div(O::sqrt(second), O::set(m.root_of_correction));
  const F step = O::div(O::mul(O::set(m.step), first), O::add(root, O::set(m.eps)));
  return O::add(decayed<O>(m.decay, param, first), step);
}

}  // namespace kimi::muon_clip_math
