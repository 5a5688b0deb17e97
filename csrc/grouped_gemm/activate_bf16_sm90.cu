// SPDX-License-Identifier: MIT
// The Hopper products that end in an activation or its gradient, bf16.
#include "grouped_gemm/product_sm90.cuh"

namespace kimi::grouped::sm90 {

template <>
Status activate<bf16>(const Job& job, void* stream) {
  constexpr Ragged kRows = Ragged::kRows;
  if (job.product.epilogue == Epilogue::kActivateBackward)
    return run<bf16, Plan{kRows, Epilogue::kActivateBackward, Major::kOuter, Shape::kWide}>(job,
                                                                                            stream);
  if (job.shape == Shape::kFew)
    return run<bf16, Plan{kRows, Epilogue::kActivate, Major::kDepth, Shape::kFew}>(job, stream);
  return run<bf16, Plan{kRows, Epilogue::kActivate, Major::kDepth, Shape::kWide}>(job, stream);
}

}  // namespace kimi::grouped::sm90
