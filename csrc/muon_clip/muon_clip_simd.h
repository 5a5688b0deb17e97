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

// Zeros that stay zeros as long as the elements at x are finite.
template <class O, class T, class F = typename O::F>
F still_zero(F zeros, const T* x, int left) {
  return O::fma(O::load(x, left), O::set(0.0f), zeros);
}

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

// Several streams at once: a core that reads a single one waits for memory.
template <class O>
bool finite(const void* x, kimi_dtype dtype, int64_t n) {
  return dispatch(dtype, [&]<class T>() {
    constexpr int kStreams = 8;
    const T* from = static_cast<const T*>(x);
    const int64_t each = n / (kStreams * O::kLanes) * O::kLanes;
    typename O::F zeros[kStreams];
    for (auto& lane : zeros) lane = O::set(0.0f);
    for (int64_t j = 0; j < each; j += O::kLanes)
      for (int s = 0; s < kStreams; ++s)
        zeros[s] = still_zero<O>(zeros[s], from + s * each + j, O::kLanes);
    from += kStreams * each;
    cpu::vectors<O>(n - kStreams * each, [&](int64_t j, int left) __attribute__((always_inline)) {
      zeros[0] = still_zero<O>(zeros[0], from + j, left);
    });
    for (int s = 1; s < kStreams; ++s) zeros[0] = O::add(zeros[0], zeros[s]);
    return O::bits(O::is_nan(zeros[0])) == 0;
  });
}

template <class O>
bool adamw(const Moments& m, void* param, kimi_dtype param_dtype, const void* grad,
           kimi_dtype grad_dtype, float* exp_avg, float* exp_avg_sq, int64_t n, const void* next,
           int64_t next_n) {
  return dispatch(param_dtype, [&]<class P>() {
    return dispatch(grad_dtype, [&]<class G>() {
      P* to = static_cast<P*>(param);
      const G *from = static_cast<const G*>(grad), *ahead = static_cast<const G*>(next);
      const auto move = [&](int64_t j, int left) __attribute__((always_inline)) {
        auto first = O::load(exp_avg + j, left), second = O::load(exp_avg_sq + j, left);
        const auto moved =
            adamw_of<O>(m, O::load(to + j, left), O::load(from + j, left), first, second);
        O::store(to + j, moved, left);
        O::store(exp_avg + j, first, left);
        O::store(exp_avg_sq + j, second, left);
      };
      const int64_t both = n < next_n ? n : next_n;
      auto zeros = O::set(0.0f);
      cpu::vectors<O>(both, [&](int64_t j, int left) __attribute__((always_inline)) {
        zeros = still_zero<O>(zeros, ahead + j, left);
        move(j, left);
      });
      cpu::vectors<O>(n - both, [&](int64_t j, int left)
                                    __attribute__((always_inline)) { move(both + j, left); });
      const bool rest = both == next_n || finite<O>(ahead + both, grad_dtype, next_n - both);
      return rest && O::bits(O::is_nan(zeros)) == 0;
    });
  });
}

template <int kCount>
double by_halves(double* sums) {
  for (int half = kCount / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

// The square of a float is exact in fp64, so each term is rounded once, as the sum takes it. A few
// sums at a time stay in registers while all rows of the block come in.
template <class O>
double squares(const void* x, kimi_dtype dtype, int64_t n) {
  return dispatch(dtype, [&]<class T>() {
    constexpr int kAtOnce = 32;
    const T* from = static_cast<const T*>(x);
    double runs[kPartials / kRun];
    for (int lane = 0; lane < kPartials; lane += kAtOnce) {
      double sums[kAtOnce] = {};
      const auto add = [&](int64_t row, int count) __attribute__((always_inline)) {
        float values[kAtOnce];
        cpu::vectors<O>(count, [&](int64_t j, int left) __attribute__((always_inline)) {
          O::store(values + j, O::load(from + row + j, left), left);
        });
        for (int l = 0; l < count; ++l) sums[l] += double(values[l]) * double(values[l]);
      };
      int64_t row = lane;
      for (; row + kAtOnce <= n; row += kPartials) add(row, kAtOnce);
      if (row < n) add(row, int(n - row));
      for (int run = 0; run < kAtOnce; run += kRun)
        runs[(lane + run) / kRun] = by_halves<kRun>(sums + run);
    }
    return by_halves<kPartials / kRun>(runs);
  });
}

template <class O>
constexpr CpuEngine kEngine = {momentum<O>, update<O>, adamw<O>, squares<O>, finite<O>};

}  // namespace
}  // namespace kimi::muon_clip_cpu
