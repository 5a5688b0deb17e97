// SPDX-License-Identifier: MIT
// The major dimensions of M-grouped Hopper products that are stored as they are.
#pragma once

#include "gemm/sm90/kernel.cuh"

namespace kimi::gemm::sm90 {

template <class T>
Status store_m(const Product& p, const StoreParams& out, bool narrow, void* stream) {
  const auto with = [&]<Major kMajor>() {
    return run_store<Traits<T, Grouping::kM, kMajor, StoreTiles<T>, 256>>(p, out, stream, narrow);
  };
  return b_major(p) == Major::kOuter ? with.template operator()<Major::kOuter>()
                                     : with.template operator()<Major::kDepth>();
}

}  // namespace kimi::gemm::sm90
