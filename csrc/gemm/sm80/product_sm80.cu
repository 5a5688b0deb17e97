// SPDX-License-Identifier: MIT
// Which of the kernels of product_sm80.cuh serves a product.
//
//   groups of 16 rows on average, or fewer  tiles of 16 rows: such a product waits for B's bytes,
//                                           and a further tile of a group finds them in the cache
//   M-grouped, stored as it is              depth-major tiles of B if its memory lies that way
//   K-grouped                               A and B outer-major
//   batch                                   either, but not A outer-major and B depth-major: then,
//                                           A's elements come one by one
#include <climits>

#include "common/dtype.h"
#include "gemm/sm80/product_sm80.h"

namespace kimi::gemm::sm80 {
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

Status make_job(const char* op, const Product& p, std::optional<Major> b_major, Job* job) {
  const bool of_k = p.grouping == Grouping::kK;
  if ((!of_k && p.depth > INT_MAX) || p.cols > INT_MAX)
    return invalid(op, ": sizes: expected depth and columns below 2^31, got ", p.depth, " and ",
                   p.cols);
  const int64_t bytes = size_of(p.dtype), groups = p.groups.count, rows = p.groups.num_rows;
  *job = {p, Major::kOuter, Major::kOuter, false, false, false};
  if (of_k) {
    job->wide_a = is_wide(p.a, 1, Major::kOuter, p.rows, bytes);
    job->wide_b = is_wide(p.b, 1, Major::kOuter, p.cols, bytes);
    return Status::ok();
  }
  const bool by_depth = is_wide(p.b, groups, Major::kDepth, p.depth, bytes);
  const bool by_outer = is_wide(p.b, groups, Major::kOuter, p.cols, bytes);
  job->b_major = b_major.value_or(!by_depth && by_outer ? Major::kOuter : Major::kDepth);
  job->wide_b = job->b_major == Major::kOuter ? by_outer : by_depth;
  job->a_major = Major::kDepth;
  if (p.grouping == Grouping::kBatch) {
    const bool a_by_depth = is_wide(p.a, groups, Major::kDepth, p.depth, bytes);
    const bool a_by_outer = is_wide(p.a, groups, Major::kOuter, p.rows, bytes);
    if (!a_by_depth && a_by_outer && job->b_major == Major::kOuter) job->a_major = Major::kOuter;
    job->wide_a = job->a_major == Major::kOuter ? a_by_outer : a_by_depth;
    return Status::ok();
  }
  job->few_rows = rows <= kFewRows * groups || rows <= kFewRows;
  job->wide_a = is_wide(p.a, 1, Major::kDepth, p.depth, bytes);
  return Status::ok();
}

}  // namespace kimi::gemm::sm80
