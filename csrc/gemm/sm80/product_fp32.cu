// SPDX-License-Identifier: MIT
// The products for sm_80 that are stored as they are, fp32.
#include "gemm/sm80/product_sm80.cuh"

namespace kimi::gemm::sm80 {
template Status store<float>(const Job&, const StoreParams&, void*);
}
