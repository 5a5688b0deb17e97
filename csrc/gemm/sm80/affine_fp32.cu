// SPDX-License-Identifier: MIT
// The batches of gemm/affine.cuh for sm_80, fp32.
#include "gemm/sm80/product_sm80.cuh"

namespace kimi::gemm::sm80 {
template Status affine<float>(const Job&, const AffineWork&, void*);
}
