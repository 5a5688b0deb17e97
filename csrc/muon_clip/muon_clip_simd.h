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
void momentum(const Momentum& m, const void* grad, kimi_dtype grad_dtype, void* buffer,
              kimi_dtype buffer_dtype, float* update, int64_t n) {
  dispatch(grad_dtype, [&]<class G>() {
    dispatch(buffer_dtype, [&]<class B>() {
      const G* from = static_cast<const G*>(grad);
      B* kept = static_cast<B*>(buffer);
      cpu::vectors<O>(n, [&](int64_t j, int left) __attribute__((always_inline)) {
        auto moved = O::load(kept + j, left);
        const auto ahead = momentum_of<O>(m, O::load(from + j, left), moved);
        O::store(kept + j, moved, left);
        O::store(update + j, ahead, left);
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
      cpu::vectors<O>(n, [&](int64_t j, int left) __attribute__((always_inline)) {
        const auto next = updated<O>(decay, rate, O::load(to + j, left), O::load(from + j, left));
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
        auto first = O::load(exp_avg + j, left), second = O::load(exp_avg_sq + j, left);
        const auto next =
            adamw_of<O>(m, O::load(to + j, left), O::load(from + j, left), first, second);
        O::store(to + j, next, left);
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
    double sums[kPartials] = {};
    for (int64_t row = 0; row < n; row += kPartials) {
      float values[kPartials];
      const int64_t count = n - row < kPartials ? n - row : kPartials;
      cpu::vectors<O>(count, [&](int64_t j, int left) __attribute__((always_inline)) {
        O::store(values + j, O::load(from + row + j, left), left);
      });
      for (int64_t l = 0; l < count; ++l) sums[l] += double(values[l]) * double(values[l]);
    }
    for (int half = kRun / 2; half > 0; half /= 2)
      for (int l = 0; l < kPartials; ++l)
        if (l % kRun < half) sums[l] += sums[l + half];
    for (int half = kPartials / 2; half >= kRun; half /= 2)
      for (int l = 0; l < half; l += kRun) sums[l] += sums[l + half];
    return sums[0];
  });
}

template <class O>
constexpr CpuEngine kEngine = {momentum<O>, update<O>, adamw<O>, squares<O>};

}  // namespace
}  // namespace kimi::muon_clip_cpu
