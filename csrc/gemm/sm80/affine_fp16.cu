// SPDX-License-Identifier: MIT
// The batches of gemm/affine.cuh for sm_80, fp16.
#include "gemm/sm80/product_sm80.cuh"

namespace kimi::gemm::sm80 {
template Status affine<fp16>(const Job&, const AffineWork&, void*);
}
