// SPDX-License-Identifier: MIT
// The shapes and major dimensions of the Hopper products with kRows and kStore.
#pragma once

#include "gemm/sm90/kernel.cuh"

namespace kimi::grouped::sm90 {

template <class T, Major kMajor>
Status store_rows_of(const Job& job, void* stream) {
  constexpr Ragged kRows = Ragged::kRows;
  constexpr Epilogue kStore = Epilogue::kStore;
  switch (job.shape) {
    case Shape::kFew:
      return run<Traits<T, kRows, kStore, kMajor, Shape::kFew>>(job, stream);
    case Shape::kNarrow:
      return run<Traits<T, kRows, kStore, kMajor, Shape::kNarrow>>(job, stream);
    default:
      return run<Traits<T, kRows, kStore, kMajor, Shape::kWide>>(job, stream);
  }
}

template <class T>
Status store_rows(const Job& job, void* stream) {
  if (job.q_outer) return store_rows_of<T, Major::kOuter>(job, stream);
  return store_rows_of<T, Major::kDepth>(job, stream);
}

}  // namespace kimi::grouped::sm90
