// SPDX-License-Identifier: MIT
// The Hopper products that end in an activation or its gradient.
#pragma once

#include "fused_experts/activate_tiles.cuh"

namespace kimi::experts {

template <class T>
Status activate_sm90(const gemm::Product& p, const ActivateParams& params, Pass pass,
                     void* stream) {
  using gemm::Grouping;
  using namespace gemm::sm90;
  if (pass == Pass::kForward) return run_activate<T>(p, params, stream);
  return run<Traits<T, Grouping::kM, Major::kOuter, Finished<ActivateBackward<T>>, 256>>(p, params,
                                                                                         stream);
}

}  // namespace kimi::experts
