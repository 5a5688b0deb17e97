// SPDX-License-Identifier: MIT
// The Hopper product with kDepth, bf16: wgrad.
#include "grouped_gemm/product_sm90.cuh"

namespace kimi::grouped::sm90 {

template <>
Status store_depth<bf16>(const Job& job, void* stream) {
  return run<bf16, Plan{Ragged::kDepth, Epilogue::kStore, Major::kOuter, Shape::kWide}>(job,
                                                                                        stream);
}

}  // namespace kimi::grouped::sm90
