// SPDX-License-Identifier: MIT
// The portable engine: the definition of permute.h in loops.
#include <cmath>
#include <cstring>

#include "common/dtype.h"
#include "permute/permute.h"

namespace kimi::permutation {
namespace {

constexpr int kPartials = 256;

void permute(const PermuteParams& p, int64_t begin, int64_t end, bool /*stream*/) {
  const char* x = static_cast<const char*>(p.x);
  char* y = static_cast<char*>(p.y);
  for (int64_t pair = begin * p.top_k; pair < end * p.top_k; ++pair)
    if (const int64_t row = p.row_map[pair]; row >= 0)
      std::memcpy(y + row * p.row_bytes, x + pair / p.top_k * p.x_stride_bytes,
                  size_t(p.row_bytes));
}

template <class T>
void unpermute_rows(const UnpermuteParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* row = p.row_map + t * p.top_k;
    for (int64_t h = 0; h < p.hidden; ++h) {
      float sum = 0.0f;
      for (int k = 0; k < p.top_k; ++k) {
        if (row[k] < 0) continue;
        const float y = to_float(static_cast<const T*>(p.y)[row[k] * p.y_stride + h]);
        sum = p.weights ? std::fma(p.weights[t * p.top_k + k], y, sum) : sum + y;
      }
      static_cast<T*>(p.x)[t * p.hidden + h] = from_float<T>(sum);
    }
  }
}

template <class T>
void backward_rows(const UnpermuteBackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t pair = begin * p.top_k; pair < end * p.top_k; ++pair) {
    const int64_t row = p.row_map[pair];
    p.grad_weights[pair] = 0.0f;
    if (row < 0) continue;
    const T* grad_x = static_cast<const T*>(p.grad_x) + pair / p.top_k * p.grad_x_stride;
    const T* y = static_cast<const T*>(p.y) + row * p.y_stride;
    T* grad_y = static_cast<T*>(p.grad_y) + row * p.hidden;
    float partial[kPartials] = {};
    for (int64_t h = 0; h < p.hidden; ++h) {
      const float g = to_float(grad_x[h]);
      float& sum = partial[h % kPartials];
      sum = std::fma(g, to_float(y[h]), sum);
      grad_y[h] = from_float<T>(p.weights[pair] * g);
    }
    for (int half = kPartials / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) partial[l] += partial[l + half];
    p.grad_weights[pair] = partial[0];
  }
}

void unpermute(const UnpermuteParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() { unpermute_rows<T>(p, begin, end); });
}

void unpermute_backward(const UnpermuteBackwardParams& p, int64_t begin, int64_t end,
                        bool /*stream*/) {
  dispatch(p.dtype, [&]<class T>() { backward_rows<T>(p, begin, end); });
}

}  // namespace

const CpuEngine kPortableEngine = {permute, unpermute, unpermute_backward};

}  // namespace kimi::permutation
