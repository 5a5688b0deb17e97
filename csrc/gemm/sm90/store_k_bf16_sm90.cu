// SPDX-License-Identifier: MIT
// The K-grouped Hopper product, bf16: wgrad.
#include "gemm/sm90/kernel.cuh"

namespace kimi::gemm::sm90 {

template <>
Status store_k<bf16>(const Product& p, const StoreParams& out, void* stream) {
  return run_store<Traits<bf16, Grouping::kK, Major::kOuter, StoreTiles<bf16>, 256>>(p, out,
                                                                                     stream);
}

}  // namespace kimi::gemm::sm90
