// SPDX-License-Identifier: MIT
// The kernels of product_sm80.cuh for fp32.
#include "gemm/sm80/product_sm80.cuh"

namespace kimi::grouped {

Status product_fp32(const Sm80Job& job, void* stream) { return serve<float, false>(job, stream); }

}  // namespace kimi::grouped
