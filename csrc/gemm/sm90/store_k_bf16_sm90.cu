// SPDX-License-Identifier: MIT
// The Hopper product with kDepth, bf16: wgrad.
#include "gemm/sm90/kernel.cuh"

namespace kimi::grouped::sm90 {

template <>
Status store_depth<bf16>(const Job& job, void* stream) {
  return run<Traits<bf16, Ragged::kDepth, Epilogue::kStore, Major::kOuter, Shape::kWide>>(job,
                                                                                          stream);
}

}  // namespace kimi::grouped::sm90
