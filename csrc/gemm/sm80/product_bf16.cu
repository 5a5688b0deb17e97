// SPDX-License-Identifier: MIT
// The products for sm_80 that are stored as they are, bf16.
#include "gemm/sm80/product_sm80.cuh"

namespace kimi::gemm::sm80 {
template Status store<bf16>(const Job&, const StoreParams&, void*);
}
