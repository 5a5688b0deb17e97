// SPDX-License-Identifier: MIT
// M-grouped Hopper products that are stored as they are, bf16: forward and dgrad.
#include "gemm/sm90/store_m.cuh"

namespace kimi::gemm::sm90 {
template Status store_m<bf16>(const Product&, const StoreParams&, bool, void*);
}
