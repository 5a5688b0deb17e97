// SPDX-License-Identifier: MIT
// The Hopper products that end in an activation or its gradient.
#pragma once

#include "fused_experts/epilogue.cuh"
#include "gemm/sm90/kernel.cuh"

namespace kimi::experts {

template <class T>
Status activate_sm90(const gemm::Product& p, const ActivateParams& params, Pass pass,
                     void* stream) {
  using gemm::Grouping;
  using namespace gemm::sm90;
  if (pass == Pass::kForward)
    return run<Traits<T, Grouping::kM, Major::kDepth, Finished<Activate<T>>, 128>>(p, params,
                                                                                   stream);
  return run<Traits<T, Grouping::kM, Major::kOuter, Finished<ActivateBackward<T>>, 256>>(p, params,
                                                                                         stream);
}

}  // namespace kimi::experts
