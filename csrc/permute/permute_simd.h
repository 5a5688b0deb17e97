// SPDX-License-Identifier: MIT
// The permutation, a template over `O`: vectors of O::kLanes floats (1 on the portable engine) with
// load and store of every dtype, and stores around the cache. Included by the engine files only.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/dtype.h"
#include "cpu/vectors.h"
#include "permute/permute.h"

namespace kimi::permutation {
namespace {  // every ISA file has its own copy

constexpr int kPartials = 256;

// A token's row stays in the L1 cache while it is written to its K places.
template <class O>
void permute(const PermuteParams& p, int64_t begin, int64_t end, bool stream) {
  const char* x = static_cast<const char*>(p.x);
  char* y = static_cast<char*>(p.y);
  for (int64_t pair = begin * p.top_k; pair < end * p.top_k; ++pair) {
    const int64_t row = p.row_map[pair];
    if (row < 0) continue;
    const char* from = x + pair / p.top_k * p.x_stride_bytes;
    char* to = y + row * p.row_bytes;
    if (stream)
      O::stream_copy(to, from, p.row_bytes);
    else
      memcpy(to, from, size_t(p.row_bytes));
  }
  if (stream) O::fence();
}

// Four vectors of columns at a time, from all K rows: K streams through memory.
template <class O, class T>
void unpermute_rows(const UnpermuteParams& p, int64_t begin, int64_t end) {
  using F = typename O::F;
  constexpr int kStep = 4 * O::kLanes;
  const T* y = static_cast<const T*>(p.y);
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* row = p.row_map + t * p.top_k;
    const float* weights = p.weights ? p.weights + t * p.top_k : nullptr;
    T* x = static_cast<T*>(p.x) + t * p.hidden;
    const auto sum_rows = [&]<int kVectors>(int64_t h, int left) __attribute__((always_inline)) {
      F sum[kVectors];
      for (int v = 0; v < kVectors; ++v) sum[v] = O::set(0.0f);
      for (int k = 0; k < p.top_k; ++k) {
        if (row[k] < 0) continue;
        const T* from = y + row[k] * p.y_stride + h;
        O::prefetch(from + 8 * kStep);
        const F w = O::set(weights ? weights[k] : 1.0f);
        for (int v = 0; v < kVectors; ++v) {
          const F value = O::load(from + v * O::kLanes, left);
          sum[v] = weights ? O::fma(w, value, sum[v]) : O::add(sum[v], value);
        }
      }
      for (int v = 0; v < kVectors; ++v) O::store(x + h + v * O::kLanes, sum[v], left);
    };
    int64_t h = 0;
    for (; h + kStep <= p.hidden; h += kStep) sum_rows.template operator()<4>(h, O::kLanes);
    cpu::vectors<O>(p.hidden - h, [&](int64_t i, int left) __attribute__((always_inline)) {
      sum_rows.template operator()<1>(h + i, left);
    });
  }
}

template <class O, class T>
void backward_rows(const UnpermuteBackwardParams& p, int64_t begin, int64_t end, bool stream) {
  using F = typename O::F;
  constexpr int kVectors = kPartials / O::kLanes;
  for (int64_t pair = begin * p.top_k; pair < end * p.top_k; ++pair) {
    const int64_t row = p.row_map[pair];
    p.grad_weights[pair] = 0.0f;
    if (row < 0) continue;
    const T* grad_x = static_cast<const T*>(p.grad_x) + pair / p.top_k * p.grad_x_stride;
    const T* y = static_cast<const T*>(p.y) + row * p.y_stride;
    T* grad_y = static_cast<T*>(p.grad_y) + row * p.hidden;
    const F w = O::set(p.weights[pair]);
    const bool around_cache = stream && O::aligned(grad_y);
    F sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = O::set(0.0f);
    int64_t h = 0;
    for (; h + kPartials <= p.hidden; h += kPartials)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = h + v * O::kLanes;
        const F g = O::load(grad_x + at);
        sum[v] = O::fma(g, O::load(y + at), sum[v]);
        if (around_cache)
          O::stream(grad_y + at, O::mul(w, g));
        else
          O::store(grad_y + at, O::mul(w, g));
      }
    alignas(64) float partial[kPartials];
    for (int v = 0; v < kVectors; ++v) O::store(partial + v * O::kLanes, sum[v]);
    cpu::vectors<O>(p.hidden - h, [&](int64_t i, int left) __attribute__((always_inline)) {
      const F g = O::load(grad_x + h + i, left);
      O::store(partial + i, O::fma(g, O::load(y + h + i, left), O::load(partial + i)), left);
      O::store(grad_y + h + i, O::mul(w, g), left);
    });
    for (int half = kPartials / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) partial[l] += partial[l + half];
    p.grad_weights[pair] = partial[0];
  }
  if (stream) O::fence();
}

template <class O>
void unpermute(const UnpermuteParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() { unpermute_rows<O, T>(p, begin, end); });
}

template <class O>
void unpermute_backward(const UnpermuteBackwardParams& p, int64_t begin, int64_t end, bool stream) {
  dispatch(p.dtype, [&]<class T>() { backward_rows<O, T>(p, begin, end, stream); });
}

template <class O>
constexpr CpuEngine kEngine = {permute<O>, unpermute<O>, unpermute_backward<O>};

}  // namespace
}  // namespace kimi::permutation
