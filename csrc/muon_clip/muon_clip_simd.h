// SPDX-License-Identifier: MIT
// The passes of muon_clip, a template over `O`: vectors of O::kLanes floats (1 on the portable
// engine). Included by the engine files only.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "cpu/vectors.h"
#include "muon_clip/muon_clip.h"

namespace kimi::muon_clip_cpu {
namespace {  // every engine file has its own copy

template <class O>
typename O::F lerp(const Lerp& l, typename O::F a, typename O::F b) {
  return O::fma(O::set(l.factor), O::sub(b, a), l.from_end ? b : a);
}

template <class O>
typename O::F negated_if(bool negate, typename O::F x) {
  return negate ? O::sub(O::set(-0.0f), x) : x;
}

template <class O>
typename O::F decayed(const Decay& d, typename O::F param, typename O::F direction) {
  const auto less = O::mul(param, O::set(d.keep));
  if (!d.cautious) return less;
  return O::select(O::less(O::set(0.0f), O::mul(direction, param)), less, param);
}

template <class O>
void momentum(const Momentum& m, const void* grad, kimi_dtype grad_dtype, void* buffer,
              kimi_dtype buffer_dtype, float* update, int64_t n) {
  dispatch(grad_dtype, [&]<class G>() {
    dispatch(buffer_dtype, [&]<class B>() {
      const G* from = static_cast<const G*>(grad);
      B* kept = static_cast<B*>(buffer);
      cpu::vectors<O>(n, [&](int64_t j, int left) __attribute__((always_inline)) {
        const auto g = negated_if<O>(m.maximize, O::load(from + j, left));
        const auto moved = lerp<O>(m.move, O::load(kept + j, left), g);
        O::store(kept + j, moved, left);
        O::store(update + j, m.nesterov ? lerp<O>(m.look_ahead, g, moved) : moved, left);
      });
    });
  });
}

template <class O>
void update(const Decay& decay, float rate, void* param, kimi_dtype param_dtype,
            const void* direction, kimi_dtype direction_dtype, void* copy, int64_t n) {
  dispatch(param_dtype, [&]<class P>() {
    dispatch(direction_dtype, [&]<class D>() {
      P* to = static_cast<P*>(param);
      const D* from = static_cast<const D*>(direction);
      bf16* beside = static_cast<bf16*>(copy);
      const auto minus_rate = O::set(-rate);
      cpu::vectors<O>(n, [&](int64_t j, int left) __attribute__((always_inline)) {
        const auto d = O::load(from + j, left);
        const auto old = decayed<O>(decay, O::load(to + j, left), d);
        const auto next = O::fma(minus_rate, d, old);
        O::store(to + j, next, left);
        if (beside) O::store(beside + j, next, left);
      });
    });
  });
}

template <class O>
void adamw(const Moments& m, void* param, kimi_dtype param_dtype, const void* grad,
           kimi_dtype grad_dtype, float* exp_avg, float* exp_avg_sq, int64_t n) {
  dispatch(param_dtype, [&]<class P>() {
    dispatch(grad_dtype, [&]<class G>() {
      P* to = static_cast<P*>(param);
      const G* from = static_cast<const G*>(grad);
      cpu::vectors<O>(n, [&](int64_t j, int left) __attribute__((always_inline)) {
        const auto g = negated_if<O>(m.maximize, O::load(from + j, left));
        const auto first = lerp<O>(m.first, O::load(exp_avg + j, left), g);
        const auto kept = O::mul(O::load(exp_avg_sq + j, left), O::set(m.beta2));
        const auto second = O::fma(O::mul(O::set(m.one_less_beta2), g), g, kept);
        const auto root = O::div(O::sqrt(second), O::set(m.root_of_correction));
        const auto denominator = O::add(root, O::set(m.eps));
        const auto old = decayed<O>(m.decay, O::load(to + j, left), first);
        const auto step = O::div(O::mul(O::set(m.step), first), denominator);
        O::store(to + j, O::add(old, step), left);
        O::store(exp_avg + j, first, left);
        O::store(exp_avg_sq + j, second, left);
      });
    });
  });
}

// The square of a float is exact in fp64, so each term is rounded once, as the sum takes it.
template <class O>
double squares(const void* x, kimi_dtype dtype, int64_t n) {
  return dispatch(dtype, [&]<class T>() {
    const T* from = static_cast<const T*>(x);
    double lanes[16] = {};
    for (int64_t j = 0; j < n; j += 16) {
      float values[16] = {};
      for (int v = 0; v < 16 && j + v < n; v += O::kLanes) {
        const int64_t left = n - j - v;
        O::store(values + v, O::load(from + j + v, left < O::kLanes ? int(left) : O::kLanes));
      }
      for (int l = 0; l < 16; ++l) lanes[l] += double(values[l]) * double(values[l]);
    }
    for (int half = 8; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
  });
}

template <class O>
constexpr CpuEngine kEngine = {momentum<O>, update<O>, adamw<O>, squares<O>};

}  // namespace
}  // namespace kimi::muon_clip_cpu
