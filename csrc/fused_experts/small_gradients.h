// SPDX-License-Identifier: MIT
// Gradients of fused_experts that are no products, on CUDA: of the weights and of the biases.
#pragma once

#include "fused_experts/fused_experts.h"

namespace kimi::experts {

// p.grad_weights from the partial sums of <c, h>, [R, ceil(F / kPartial)].
Status grad_weights_cuda(const FusedExpertsBackwardParams& p, const float* partial, void* stream);

// out[e] = sum of the rows of e of x [R, cols]; both dense, in the dtype of p.
Status row_sums_cuda(const FusedExpertsBackwardParams& p, const void* x, int64_t cols, void* out,
                     void* stream);

// out[e] = sum over the rows of e of their weight times dy: [E, H].
Status weighted_token_sums_cuda(const FusedExpertsBackwardParams& p, void* out, void* stream);

}  // namespace kimi::experts
