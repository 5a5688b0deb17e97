// SPDX-License-Identifier: MIT
// product_sm90: what it serves, and which of its kernels.
#include <climits>

#include "common/dtype.h"
#include "gemm/sm90/job.h"

namespace kimi::grouped {
namespace {

constexpr int64_t kBytes = 2;  // of an element
// From this many rows a group on, the half-empty tile of 256 rows at the end of a group costs less
// (14 %) than the pair saves of L2's bandwidth (26 %); up to kFewRows Q's bytes are what there is
// to wait for.
constexpr int64_t kPairedRows = 384, kFewRows = 64;
constexpr int64_t kManyTiles = 132;  // of 128 x 256: enough for every multiprocessor

bool divides16(int64_t elements) { return elements > 0 && elements * kBytes % 16 == 0; }

// TMA can load it, or cp.async if it has an index, along the dimension of length `along`.
bool is_loadable(const Matrix& m, int64_t stride, int64_t along) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && divides16(stride) &&
         stride * kBytes < int64_t{1} << 40 &&
         (m.index == nullptr || (along % 8 == 0 && m.divisor > 0));
}

bool q_is_outer(const Product& p) { return p.q.depth_stride != 1; }

bool serves_depth(const Product& p) {
  return p.p.outer_stride == 1 && p.q.outer_stride == 1 &&
         (p.p.index == nullptr || p.q.index == nullptr) &&
         is_loadable(p.p, p.p.depth_stride, p.rows) && is_loadable(p.q, p.q.depth_stride, p.cols);
}

bool serves_rows(const Product& p) {
  const bool outer = q_is_outer(p);
  if (p.depth < 1 || p.depth > INT_MAX || p.p.depth_stride != 1 || p.q.index != nullptr ||
      (outer && p.q.outer_stride != 1))
    return false;
  if (p.epilogue != Epilogue::kStore && outer != (p.epilogue == Epilogue::kActivateBackward))
    return false;
  if (p.num_groups > 1 &&
      (!divides16(p.q.group_stride) || p.q.group_stride * kBytes >= int64_t{1} << 40))
    return false;
  return is_loadable(p.p, p.p.outer_stride, p.depth) &&
         is_loadable(p.q, outer ? p.q.depth_stride : p.q.outer_stride, p.depth);
}

template <class T>
Status run_family(const sm90::Job& job, void* stream) {
  if (job.product.ragged == Ragged::kDepth) return sm90::store_depth<T>(job, stream);
  if (job.product.epilogue == Epilogue::kStore) return sm90::store_rows<T>(job, stream);
  return sm90::activate<T>(job, stream);
}

}  // namespace

bool serves_sm90(const Product& p) {
  if (p.dtype != KIMI_BFLOAT16 && p.dtype != KIMI_FLOAT16) return false;
  if (p.num_rows < 1 || p.num_groups < 1 || p.cols < 1 || p.cols > INT_MAX / 2 ||
      p.num_rows > INT_MAX)
    return false;
  return p.ragged == Ragged::kDepth ? p.rows >= 1 && p.rows <= INT_MAX && serves_depth(p)
                                    : serves_rows(p);
}

namespace sm90 {

Job make_job(const Product& p) {
  Job job{p, q_is_outer(p), Shape::kWide, false};
  if (p.ragged == Ragged::kDepth) {
    const int64_t row_tiles = (p.rows + 127) / 128;
    job.paired = row_tiles % 2 == 0 || row_tiles >= 16;
    return job;
  }
  const int64_t mean = p.num_rows / p.num_groups;
  if (mean <= kFewRows && p.epilogue != Epilogue::kActivateBackward) {
    job.shape = Shape::kFew;
    return job;
  }
  job.paired = mean >= kPairedRows;
  const int64_t tiles = (p.num_rows / 128 + 1) * ((p.cols + 255) / 256);
  if (p.epilogue == Epilogue::kStore && (p.cols <= 128 || tiles < kManyTiles)) {
    job.shape = Shape::kNarrow;
    job.paired = false;
  }
  return job;
}

Status run_job(const Job& job, void* stream) {
  if (job.product.dtype == KIMI_BFLOAT16) return run_family<bf16>(job, stream);
  return run_family<fp16>(job, stream);
}

}  // namespace sm90

Status product_sm90(const Product& p, void* stream) {
  if (!serves_sm90(p)) return invalid("product_sm90: operands: expected what serves_sm90 accepts");
  return sm90::run_job(sm90::make_job(p), stream);
}

}  // namespace kimi::grouped
