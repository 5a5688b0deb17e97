// SPDX-License-Identifier: MIT
#include "fused_experts/activate_sm90.cuh"

namespace kimi::experts {
template Status activate_sm90<bf16>(const gemm::Product&, const ActivateParams&, Pass, void*);
}
