// SPDX-License-Identifier: MIT
// product_sm80: which of the kernels of product_sm80.cuh serves a product.
//
//   groups of 16 rows on average, or fewer  tiles of 16 rows: such a product waits for Q's bytes,
//                                           and a further tile of a group finds them in the cache
//   Q of kStore with kRows                  depth-major tiles if its memory is contiguous that way
//   kDepth                                  P and Q outer-major
#include <climits>

#include "common/dtype.h"
#include "gemm/sm80/product_sm80.h"

namespace kimi::grouped {
namespace {

constexpr int64_t kFewRows = 16;

// Whether cp.async can copy an operand of `matrices` into tiles that are contiguous along `major`,
// where the operand is `extent` long.
bool is_wide(const Matrix& m, int64_t matrices, Major major, int64_t extent,
             int64_t element_bytes) {
  const int64_t along = major == Major::kDepth ? m.depth_stride : m.outer_stride;
  const int64_t across = major == Major::kDepth ? m.outer_stride : m.depth_stride;
  const auto divides = [&](int64_t elements) { return elements * element_bytes % 16 == 0; };
  return along == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && divides(across) &&
         (matrices <= 1 || divides(m.group_stride)) && divides(extent);
}

}  // namespace

Status product_sm80(const Product& p, void* stream) {
  if ((p.ragged == Ragged::kRows && p.depth > INT_MAX) || p.cols > INT_MAX)
    return invalid("grouped product: sizes: expected depth and columns below 2^31, got ", p.depth,
                   " and ", p.cols);
  const int64_t bytes = size_of(p.dtype);
  Sm80Job job{p, Major::kOuter, false, false, false};
  if (p.ragged == Ragged::kDepth) {
    job.wide_p = is_wide(p.p, 1, Major::kOuter, p.rows, bytes);
    job.wide_q = is_wide(p.q, 1, Major::kOuter, p.cols, bytes);
  } else {
    const bool by_depth = is_wide(p.q, p.num_groups, Major::kDepth, p.depth, bytes);
    const bool by_outer = is_wide(p.q, p.num_groups, Major::kOuter, p.cols, bytes);
    const bool outer = p.epilogue == Epilogue::kActivateBackward ||
                       (p.epilogue == Epilogue::kStore && !by_depth && by_outer);
    job.q_major = outer ? Major::kOuter : Major::kDepth;
    job.few_rows = p.num_rows <= kFewRows * p.num_groups || p.num_rows <= kFewRows;
    job.wide_p = is_wide(p.p, 1, Major::kDepth, p.depth, bytes);
    job.wide_q = outer ? by_outer : by_depth;
  }
  switch (p.dtype) {
    case KIMI_BFLOAT16:
      return product_bf16(job, stream);
    case KIMI_FLOAT16:
      return product_fp16(job, stream);
    default:
      return product_fp32(job, stream);
  }
}

}  // namespace kimi::grouped
