// SPDX-License-Identifier: MIT
// Sums become output, for SIMD engines; a template over `O`, vectors with loads and stores of every
// dtype (cpu/vec_*.h). Included by the ISA files only.
#pragma once

#include "grouped_gemm/grouped_gemm.h"

namespace kimi::grouped {
namespace {  // every ISA file has its own copy

template <class O, class T, class B>
void store_rows(const StoreArguments& s) {
  const B* bias = static_cast<const B*>(s.bias);
  for (int64_t i = 0; i < s.rows; ++i) {
    const float* c = s.c + i * s.c_stride;
    T* out = static_cast<T*>(s.out) + i * s.out_stride;
    const bool around_cache = s.stream && O::aligned(out);
    int64_t j = 0;
    for (; j + O::kLanes <= s.cols; j += O::kLanes) {
      auto sum = O::load(c + j);
      if (bias) sum = O::add(sum, O::load(bias + j));
      if (s.accumulate) sum = O::add(sum, O::load(out + j));
      if (around_cache)
        O::stream(out + j, sum);
      else
        O::store(out + j, sum);
    }
    for (; j < s.cols; ++j) {
      float sum = c[j];
      if (bias) sum += to_float(bias[j]);
      if (s.accumulate) sum += to_float(out[j]);
      out[j] = from_float<T>(sum);
    }
  }
  if (s.stream) O::fence();
}

template <class O>
void store(const StoreArguments& s) {
  dispatch(s.out_dtype,
           [&]<class T>() { dispatch(s.bias_dtype, [&]<class B>() { store_rows<O, T, B>(s); }); });
}

}  // namespace
}  // namespace kimi::grouped
