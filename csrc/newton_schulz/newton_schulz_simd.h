// SPDX-License-Identifier: MIT
// The elementwise passes of newton_schulz, a template over `O`: vectors of O::kLanes floats (1 on
// the portable engine). Included by the engine files only.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "cpu/vectors.h"
#include "newton_schulz/newton_schulz.h"

namespace kimi::newton_schulz_cpu {
namespace {  // every engine file has its own copy

template <class O>
float largest(const void* x, kimi_dtype dtype, int64_t n) {
  return dispatch(dtype, [&]<class T>() {
    const T* from = static_cast<const T*>(x);
    auto most = O::set(0.0f);
    cpu::vectors<O>(n, [&](int64_t j, int left) __attribute__((always_inline)) {
      most = O::max(O::abs(O::load(from + j, left)), most);
    });
    return O::reduce_max(most);
  });
}

template <class O, bool kSquares>
void sums_along(const void* x, kimi_dtype dtype, int64_t n, float scale, float lanes[16]) {
  dispatch(dtype, [&]<class T>() {
    constexpr int kVectors = 16 / O::kLanes;
    const T* from = static_cast<const T*>(x);
    typename O::F sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = O::load(lanes + v * O::kLanes);
    int64_t j = 0;
    for (; j + 16 <= n; j += 16)
      for (int v = 0; v < kVectors; ++v) {
        const auto value = O::mul(O::load(from + j + v * O::kLanes), O::set(scale));
        sum[v] = kSquares ? O::fma(value, value, sum[v]) : O::add(sum[v], O::abs(value));
      }
    for (int v = 0; v < kVectors; ++v) O::store(lanes + v * O::kLanes, sum[v]);
    for (; j < n; ++j) {
      const float value = to_float(from[j]) * scale;
      float& lane = lanes[j % 16];
      lane = kSquares ? __builtin_fmaf(value, value, lane) : lane + __builtin_fabsf(value);
    }
  });
}

template <class O>
void squares_across(const void* x, kimi_dtype dtype, int64_t n, float scale, float* sums) {
  dispatch(dtype, [&]<class T>() {
    const T* from = static_cast<const T*>(x);
    cpu::vectors<O>(n, [&](int64_t j, int left) __attribute__((always_inline)) {
      const auto value = O::mul(O::load(from + j, left), O::set(scale));
      O::store(sums + j, O::fma(value, value, O::load(sums + j, left)), left);
    });
  });
}

template <class O>
void divide(const void* x, kimi_dtype dtype, int64_t n, float scale, float divisor,
            const float* each, void* y, kimi_dtype y_dtype) {
  dispatch(dtype, [&]<class T>() {
    dispatch(y_dtype, [&]<class Y>() {
      const T* from = static_cast<const T*>(x);
      Y* to = static_cast<Y*>(y);
      cpu::vectors<O>(n, [&](int64_t j, int left) __attribute__((always_inline)) {
        const auto scaled = O::mul(O::load(from + j, left), O::set(scale));
        auto by = O::set(divisor);
        if (each) by = O::mul(by, O::load(each + j, left));
        O::store(to + j, O::div(scaled, by), left);
      });
    });
  });
}

// One row of a tile, n columns. `same`: D has the dtype of the rounding, and unit is 1.
template <class O, class T, class D, bool kSame>
void store_row(const Tile& t, const float* sums, const T* c, D* d, int64_t n, int64_t on_diagonal) {
  const auto finish = [&](float value) {
    return from_float<D>(kSame ? value : to_float(from_float<T>(value)) * t.unit);
  };
  const bool add_delta = t.delta != 0.0f && on_diagonal >= 0 && on_diagonal < n;
  float diagonal = 0.0f;
  if (add_delta) {  // before c is overwritten
    diagonal = t.alpha * sums[on_diagonal];
    if (c) diagonal = __builtin_fmaf(t.beta, to_float(c[on_diagonal]), diagonal);
    diagonal += t.delta;
  }
  const auto alpha = O::set(t.alpha), beta = O::set(t.beta);
  cpu::vectors<O>(n, [&](int64_t j, int left) __attribute__((always_inline)) {
    auto value = O::mul(alpha, O::load(sums + j, left));
    if (c) value = O::fma(beta, O::load(c + j, left), value);
    if constexpr (!kSame) {
      T rounded[O::kLanes];
      O::store(rounded, value);
      value = O::mul(O::load(rounded), O::set(t.unit));
    }
    O::store(d + j, value, left);
  });
  if (add_delta) d[on_diagonal] = finish(diagonal);
}

template <class O>
void store(const Tile& t) {
  dispatch(t.dtype, [&]<class T>() {
    dispatch(t.d_dtype, [&]<class D>() {
      const auto rows = [&]<bool kSame>() {
        const T* c = static_cast<const T*>(t.c);
        D* d = static_cast<D*>(t.d);
        for (int64_t i = 0; i < t.rows; ++i, d += t.d_stride) {
          const int64_t through = i + t.diagonal + 1;  // columns up to the diagonal
          const int64_t n = t.lower && through < t.cols ? through : t.cols;
          if (n > 0)
            store_row<O, T, D, kSame>(t, t.sums + i * 32, c ? c + i * t.c_stride : nullptr, d, n,
                                      through - 1);
        }
      };
      if (t.dtype == t.d_dtype && t.unit == 1.0f)
        rows.template operator()<true>();
      else
        rows.template operator()<false>();
    });
  });
}

template <class O>
constexpr CpuEngine kEngine = {largest<O>,        sums_along<O, true>, sums_along<O, false>,
                               squares_across<O>, divide<O>,           store<O>};

}  // namespace
}  // namespace kimi::newton_schulz_cpu
