// SPDX-License-Identifier: MIT
// M-grouped Hopper products that are stored as they are, fp16: forward and dgrad.
#include "gemm/sm90/store_m.cuh"

namespace kimi::gemm::sm90 {
template Status store_m<fp16>(const Product&, const StoreParams&, bool, void*);
}
