// SPDX-License-Identifier: MIT
// What a pass computes once for a tensor, on the host or in a kernel, with the same bits: numbers
// of a group, some of which lie on the device, become those that its elements meet.
#pragma once

#include <cmath>

#include "device/math.cuh"
#include "muon_clip/formulas.h"
#include "muon_clip/muon_clip.h"

namespace kimi::muon_clip_math {

KIMI_HOST_DEVICE double or_one(const double* factor) { return factor ? *factor : 1.0; }

KIMI_HOST_DEVICE bool is_finite(double x) { return x - x == 0; }

// Whether a tensor moves: none of its pieces has a sum of squares that is not finite.
KIMI_HOST_DEVICE bool moves(const double* squares, int64_t first, int64_t last) {
  bool all = true;
  for (int64_t i = first; squares && i < last; ++i) all = all && is_finite(squares[i]);
  return all;
}

// x^n, n > 0, by squarings: pow() is not the same on a host and a GPU.
KIMI_HOST_DEVICE double power(double x, int64_t n) {
  double result = 1.0;
  for (; n > 0; n /= 2) {
    if (n % 2 == 1) result = mul_rn(result, x);
    x = mul_rn(x, x);
  }
  return result;
}

KIMI_HOST_DEVICE Momentum momentum_of(const MuonMomentumParams& p) {
  return {lerp_by(1 - p.momentum), lerp_by(p.momentum), p.maximize ? -1.0f : 1.0f, p.nesterov != 0};
}

KIMI_HOST_DEVICE Decay decay_of(double decay, const double* lr, const double* weight_decay,
                                bool cautious) {
  return {float(fma(-mul_rn(decay, or_one(lr)), or_one(weight_decay), 1.0)), cautious};
}

KIMI_HOST_DEVICE float rate_of(double rate, const double* lr) {
  return float(mul_rn(rate, or_one(lr)));
}

// `step` counts from 1.
KIMI_HOST_DEVICE Moments moments_of(const AdamwParams& p, float step) {
  const int64_t steps = int64_t(step);
  const double lr = mul_rn(p.lr, or_one(p.lr_factor));
  const double first = 1 - power(p.beta1, steps), second = 1 - power(p.beta2, steps);
  const float scale = p.scale ? *p.scale : 1.0f;
  return {lerp_by(1 - p.beta1),
          float(p.beta2),
          float(1 - p.beta2),
          float(sqrt(second)),
          float(p.eps),
          float(-lr / first),
          p.maximize ? -scale : scale,
          decay_of(mul_rn(lr, p.weight_decay), nullptr, p.weight_decay_factor, p.cautious != 0)};
}

// The last of the sums: `n` lanes, those of the upper half added to the lower, and so on.
template <class Sums>
KIMI_HOST_DEVICE double tree(Sums& sums, int n) {
  for (int half = n / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

KIMI_HOST_DEVICE float clip_factor_of(double sum_of_squares, double max_norm) {
  const double factor = max_norm / (sqrt(sum_of_squares) + 1e-6);
  return factor < 1.0 ? float(factor) : 1.0f;
}

}  // namespace kimi::muon_clip_math
