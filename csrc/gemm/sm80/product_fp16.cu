// SPDX-License-Identifier: MIT
// The kernels of product_sm80.cuh for fp16.
#include "gemm/sm80/product_sm80.cuh"

namespace kimi::grouped {

Status product_fp16(const Sm80Job& job, void* stream) { return serve<fp16, true>(job, stream); }

}  // namespace kimi::grouped
