// SPDX-License-Identifier: MIT
#include "fused_experts/activate_sm80.cuh"

namespace kimi::experts {
template Status activate_sm80<float>(const gemm::sm80::Job&, const ActivateParams&, Pass, void*);
}
