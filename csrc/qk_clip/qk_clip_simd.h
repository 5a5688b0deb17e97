// SPDX-License-Identifier: MIT
// Maxima of sums and scaled rows, a template over `O`: vectors of O::kLanes floats (1 on the
// portable engine). Included by the engine files only.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "cpu/vectors.h"
#include "qk_clip/qk_clip.h"

namespace kimi::qk_clip_cpu {
namespace {  // every engine file has its own copy

template <class O>
float largest(const float* sums, int64_t rows, int64_t cols, int64_t visible) {
  constexpr int kVectors = 32 / O::kLanes;
  const float none = -__builtin_inff();
  typename O::F most[kVectors];
  for (auto& vector : most) vector = O::set(none);
  auto nan = O::is_nan(O::set(none));
  float rest = none;  // of rows that are cut
  bool nan_in_rest = false;
  for (int64_t i = 0; i < rows; ++i, sums += 32) {
    const int64_t seen = visible + i < cols ? visible + i : cols;
    if (seen == 32) {
      for (int v = 0; v < kVectors; ++v) {
        const auto value = O::load(sums + v * O::kLanes);
        most[v] = O::max(value, most[v]);  // keeps `most` beside a NaN
        nan = O::either(nan, O::is_nan(value));
      }
      continue;
    }
    for (int64_t j = 0; j < seen; ++j) {
      rest = sums[j] > rest ? sums[j] : rest;
      nan_in_rest = nan_in_rest || sums[j] != sums[j];
    }
  }
  if (nan_in_rest || O::bits(nan) != 0) return __builtin_nanf("");
  for (const auto& vector : most) {
    float lanes[O::kLanes];
    O::store(lanes, vector);
    for (float lane : lanes) rest = lane > rest ? lane : rest;
  }
  return rest;
}

template <class O>
void scale(void* x, kimi_dtype dtype, int64_t n, float factor) {
  dispatch(dtype, [&]<class T>() {
    T* to = static_cast<T*>(x);
    cpu::vectors<O>(n, [&](int64_t j, int left) __attribute__((always_inline)) {
      O::store(to + j, O::mul(O::load(to + j, left), O::set(factor)), left);
    });
  });
}

template <class O>
constexpr CpuEngine kEngine = {largest<O>, scale<O>};

}  // namespace
}  // namespace kimi::qk_clip_cpu
