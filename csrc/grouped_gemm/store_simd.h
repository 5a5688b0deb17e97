// SPDX-License-Identifier: MIT
// Sums become output, a template over `O`, the vectors of cpu/vec_*.h (one lane on the portable
// engine). Included by the engine files only.
#pragma once

#include "common/dtype.h"
#include "cpu/vectors.h"
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
    cpu::vectors<O>(s.cols, [&](int64_t j, int left) __attribute__((always_inline)) {
      auto sum = O::load(c + j, left);
      if (bias) sum = O::add(sum, O::load(bias + j, left));
      if (s.accumulate) sum = O::add(sum, O::load(out + j, left));
      if (around_cache && left == O::kLanes)
        O::stream(out + j, sum);
      else
        O::store(out + j, sum, left);
    });
  }
  if (s.stream) O::fence();
}

template <class O>
void store(const StoreArguments& s) {
  dispatch(s.out_dtype,
           [&]<class T>() { dispatch(s.bias_dtype, [&]<class B>() { store_rows<O, T, B>(s); }); });
}

template <class O>
constexpr CpuEngine kEngine = {store<O>};

}  // namespace
}  // namespace kimi::grouped
