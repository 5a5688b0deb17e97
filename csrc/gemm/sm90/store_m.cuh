// SPDX-License-Identifier: MIT
// The tiles and major dimensions of M-grouped Hopper products that are stored as they are.
#pragma once

#include "gemm/sm90/kernel.cuh"

namespace kimi::gemm::sm90 {

template <class T>
Status store_m(const Product& p, const StoreParams& out, bool narrow, void* stream) {
  const auto with = [&]<Major kMajor, int kTileCols>() {
    return run_store<Traits<T, Grouping::kM, kMajor, StoreTiles<T>, kTileCols>>(p, out, stream);
  };
  if (b_major(p) == Major::kOuter)
    return narrow ? with.template operator()<Major::kOuter, 128>()
                  : with.template operator()<Major::kOuter, 256>();
  return narrow ? with.template operator()<Major::kDepth, 128>()
                : with.template operator()<Major::kDepth, 256>();
}

}  // namespace kimi::gemm::sm90
