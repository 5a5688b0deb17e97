// SPDX-License-Identifier: MIT
// The kernels of product_sm80.cuh for bf16.
#include "gemm/sm80/product_sm80.cuh"

namespace kimi::grouped {

Status product_bf16(const Sm80Job& job, void* stream) { return serve<bf16, true>(job, stream); }

}  // namespace kimi::grouped
