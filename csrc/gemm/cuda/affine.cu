// SPDX-License-Identifier: MIT
// Which kernel takes a batch: by addresses, strides, dtypes and sizes, never by values.
#include "common/dtype.h"
#include "gemm/affine.cuh"
#include "gemm/sm80/product_sm80.h"
#include "gemm/sm90/job.h"

namespace kimi::gemm {

Status affine_cuda(const char* op, const Product& p, const AffineParams& params, void* stream) {
  if (is_empty(p)) return Status::ok();
  const AffineWork out = work_of(p, params);
  bool hopper = false;
  KIMI_RETURN_IF_ERROR(is_hopper(op, &hopper));
  if (hopper && sm90::serves(p)) {
    const bool narrow = sm90::is_narrow(p);
    return p.dtype == KIMI_BFLOAT16 ? sm90::affine<bf16>(p, out, narrow, stream)
                                    : sm90::affine<fp16>(p, out, narrow, stream);
  }
  sm80::Job job;
  KIMI_RETURN_IF_ERROR(sm80::make_job(op, p, std::nullopt, &job));
  return dispatch(p.dtype, [&]<class T>() { return sm80::affine<T>(job, out, stream); });
}

}  // namespace kimi::gemm
