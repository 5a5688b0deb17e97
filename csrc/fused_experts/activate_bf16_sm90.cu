// SPDX-License-Identifier: MIT
// The Hopper products that end in an activation or its gradient, bf16.
#include "gemm/sm90/kernel.cuh"

namespace kimi::grouped::sm90 {

template <>
Status activate<bf16>(const Job& job, void* stream) {
  constexpr Ragged kRows = Ragged::kRows;
  if (job.product.epilogue == Epilogue::kActivateBackward)
    return run<Traits<bf16, kRows, Epilogue::kActivateBackward, Major::kOuter, Shape::kWide>>(
        job, stream);
  if (job.shape == Shape::kFew)
    return run<Traits<bf16, kRows, Epilogue::kActivate, Major::kDepth, Shape::kFew>>(job, stream);
  return run<Traits<bf16, kRows, Epilogue::kActivate, Major::kDepth, Shape::kWide>>(job, stream);
}

}  // namespace kimi::grouped::sm90
