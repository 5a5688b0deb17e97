// SPDX-License-Identifier: MIT
// Which kernel takes a batch: by addresses, strides, dtypes and sizes, never by values.
#include "common/dtype.h"
#include "gemm/affine.cuh"
#include "gemm/sm80/product_sm80.h"

namespace kimi::gemm {

Status affine_cuda(const Product& p, const AffineParams& params, void* stream) {
  if (is_empty(p)) return Status::ok();
  const auto is_wide = [&](const void* data, int64_t row, int64_t group, kimi_dtype dtype) {
    const int64_t size = size_of(dtype);
    return divides16(data, row, size) && (p.groups.count == 1 || divides16(data, group, size));
  };
  AffineWork out{params, false, false};
  if (out.beta == 0.0f) out.c = nullptr;
  out.wide_c = is_wide(out.c, out.c_row_stride, out.c_group_stride, p.dtype);
  out.wide_d = is_wide(out.d, out.d_row_stride, out.d_group_stride, out.d_dtype);
  bool hopper = false;
  KIMI_RETURN_IF_ERROR(is_hopper(&hopper));
  sm80::Job job;
  KIMI_RETURN_IF_ERROR(sm80::make_job(p, std::nullopt, &job));
  return dispatch(p.dtype, [&]<class T>() { return sm80::affine<T>(job, out, stream); });
}

}  // namespace kimi::gemm
