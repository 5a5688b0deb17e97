// SPDX-License-Identifier: MIT
// The z-loss for SIMD engines, a template over `O`, the vectors of cpu/vec_*.h. Included by the ISA
// files only.
//
//   row --peak--> z[E] in the first-level cache --exp--> 32 partial sums
//   64 rows' sums --log--> lse [64], a few vectors
//
// The second stage fetches the next block's rows, so that memory and arithmetic overlap.
#pragma once

#include "balance/balance_simd.h"

namespace kimi::balance {
namespace {

// The largest of a row, at least the lowest finite number; its values to z [E].
template <class O, class T>
float find_peak(const T* logits, int num_experts, float* z) {
  using F = typename O::F;
  F tops[32 / O::kLanes];
  for (F& top : tops) top = O::set(-kMaxFloat);
  each_vector<O>(num_experts, [&](int e, int left, int i) {
    const F raw = O::load_or(logits + e, left, -kInfinity);
    O::store(z + e, raw);
    tops[i] = O::max(raw, tops[i]);  // the second operand where the first is NaN
  });
  for (int i = 1; i < 32 / O::kLanes; ++i) tops[0] = O::max(tops[0], tops[i]);
  return O::reduce_max(tops[0]);
}

// The sum of exp(z - peak). Without kInfinite there is no +inf among z, and a NaN vanishes by
// itself: its exponential is 0. Meanwhile the row `next` elements behind `logits` is fetched.
template <class O, bool kInfinite, class T>
float sum_exponentials(const float* z, int num_experts, float peak, const T* logits, int64_t next) {
  VectorSum<O> sum;
  each_vector<O>(num_experts, [&](int e, int, int i) {
    prefetch_ahead(logits + e, next);
    const typename O::F raw = O::load(z + e);
    sum.add(i, softmax_numerator<O>(kInfinite ? clean<O>(raw) : raw, O::set(peak)));
  });
  return sum.total();
}

template <class O, class T>
float sum_squares_of(const ZLossParams& p, int64_t begin, int64_t end) {
  using F = typename O::F;
  const int count = int(end - begin);
  alignas(64) float z[kBlock][kRowLength], peak[kRun], sum[kRun];
  for (int first = 0; first < kRun; first += kBlock) {
    const auto each = [&](const auto& stage) {
      for (int i = first; i < first + kBlock && i < count; ++i)
        if (!p.valid || p.valid[begin + i]) stage(i, z[i - first]);
    };
    for (int i = first; i < first + kBlock; ++i) peak[i] = 0.0f, sum[i] = 1.0f;  // of log 1 = 0
    each([&](int i, float* row) {
      peak[i] = find_peak<O>(row_of<T>(p, begin + i), p.num_experts, row);
    });
    each([&](int i, float* row) {
      const bool infinite = peak[i] > kMaxFloat;
      if (infinite) peak[i] = kMaxFloat;
      const T* logits = row_of<T>(p, begin + i);
      const int64_t next = kBlock * p.logits_stride;
      sum[i] = infinite ? sum_exponentials<O, true>(row, p.num_experts, peak[i], logits, next)
                        : sum_exponentials<O, false>(row, p.num_experts, peak[i], logits, next);
    });
  }
  for (int i = 0; i < kRun; i += O::kLanes) {
    const F x = O::load(sum + i);
    const F lse = O::add(O::load(peak + i), math::log_at_least_one<O>(x));
    O::store(peak + i, O::select(O::less(O::set(0.0f), x), lse, O::set(-kInfinity)));
  }
  float total = 0.0f;
  for (int i = 0; i < count; ++i) {
    p.log_sum_exp[begin + i] = peak[i];
    total += peak[i] * peak[i];
  }
  return total;
}

// kInfinite as in sum_exponentials.
template <class O, class T, bool kInfinite>
void z_gradient_row(const T* logits, int num_experts, float factor, float lse, T* grad) {
  each_vector<O>(num_experts, [&](int e, int left, int) {
    const typename O::F raw = O::load(logits + e, left);
    const auto share = softmax_numerator<O>(kInfinite ? clean<O>(raw) : raw, O::set(lse));
    O::store(grad + e, O::mul(O::set(factor), share), left);
  });
}

template <class O, class T>
void z_gradient_of(const ZLossBackwardParams& p, int64_t begin, int64_t end) {
  const float weight = 2.0f * (*p.grad_loss * z_scale(p.coefficient, *p.valid_tokens));
  for (int64_t t = begin; t < end; ++t) {
    const T* logits = row_of<T>(p, t);
    T* grad = static_cast<T*>(p.grad_logits) + t * p.num_experts;
    const float lse = p.log_sum_exp[t];
    if (lse == 0.0f || lse == -kInfinity) {  // left out, or nothing but -inf
      memset(grad, 0, sizeof(T) * p.num_experts);
      continue;
    }
    const auto row = lse < kMaxFloat ? z_gradient_row<O, T, false> : z_gradient_row<O, T, true>;
    row(logits, p.num_experts, weight * lse, lse, grad);
  }
}

template <class O>
float sum_squares(const ZLossParams& p, int64_t begin, int64_t end) {
  return dispatch(p.logits_dtype, [&]<class T>() { return sum_squares_of<O, T>(p, begin, end); });
}
template <class O>
void z_gradient(const ZLossBackwardParams& p, int64_t begin, int64_t end) {
  dispatch(p.logits_dtype, [&]<class T>() { z_gradient_of<O, T>(p, begin, end); });
}

template <class O>
constexpr CpuEngine kEngine = {sum_terms<O>, balance_gradient<O>, sum_squares<O>, z_gradient<O>,
                               scores<O>};

}  // namespace
}  // namespace kimi::balance
