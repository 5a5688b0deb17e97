// SPDX-License-Identifier: MIT
// An epilogue of gemm/epilogue.cuh on Hopper: a warp's 16 rows, a chunk of columns after the other.
#pragma once

#include <utility>

#include "gemm/epilogue.cuh"
#include "gemm/sm90/ring.cuh"

namespace kimi::gemm::sm90 {

template <class Policy>
class Finished {
  static constexpr int kChunk = Policy::kGated ? 16 : 32;
  using Finisher = Finish<Policy, kChunk>;

 public:
  using Params = typename Policy::Params;
  static constexpr bool kGated = Policy::kGated, kWritesZeros = Policy::kWritesZeros,
                        kTogether = false;
  static constexpr int kScratchBytes = Finisher::kScratchFloats * 4;  // of a warp

  template <class X>
  __device__ static void run(const Params& params, const Product& p, const Work& work, int32_t row,
                             int valid, const float (&d)[X::kSums], char* scratch) {
    constexpr int kUp = kGated ? X::kSums / 2 : 0;  // where the up sums begin
    constexpr int kChunks = X::kTileCols / kChunk;
    float* const floats = reinterpret_cast<float*>(scratch);
    // One copy of the policy serves all chunks: only the way from the registers, whose numbers are
    // fixed, is written out.
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int64_t col = work.col + chunk * kChunk;
      if (col >= end_of<X>(p, work)) return;
      [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
        ((chunk == kIndex
              ? Finisher::template collect<kIndex * kChunk / 2, kUp + kIndex * kChunk / 2>(d,
                                                                                           floats)
              : void()),
         ...);
      }(std::make_integer_sequence<int, kChunks>());
      Finisher::write(params, p, Rows{work.group, row, valid < 16 ? valid : 16}, col, floats);
    }
  }
  __device__ static void end(const Params&) {}
};

}  // namespace kimi::gemm::sm90
