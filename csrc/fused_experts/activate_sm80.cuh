// SPDX-License-Identifier: MIT
// The products of sm_80 that end in an activation or its gradient.
#pragma once

#include "fused_experts/epilogue.cuh"
#include "gemm/sm80/product_sm80.cuh"

namespace kimi::experts {

template <class T>
Status activate_sm80(const gemm::sm80::Job& job, const ActivateParams& params, Pass pass,
                     void* stream) {
  if (pass == Pass::kForward)
    return gemm::sm80::launch_rows<T, Major::kDepth, Activate<T>>(job, params, stream);
  return gemm::sm80::launch_rows<T, Major::kOuter, ActivateBackward<T>>(job, params, stream);
}

}  // namespace kimi::experts
