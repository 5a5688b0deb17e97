// SPDX-License-Identifier: MIT
// The batches of gemm/affine.cuh on Hopper, bf16.
#include "gemm/sm90/affine_tiles.cuh"

namespace kimi::gemm::sm90 {
template Status affine<bf16>(const Product&, const AffineWork&, bool, void*);
}
