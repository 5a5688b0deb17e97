// SPDX-License-Identifier: MIT
// Which kernel takes a product that is stored as it is.
//
//   compute capability 9.x, operands that TMA can read    wgmma       sm90/
//   everything else                                       mma.sync    sm80/
//
// The choice depends on addresses, strides, dtypes and sizes, never on values: no host sync.
#include "common/dtype.h"
#include "device/launch.cuh"
#include "gemm/product.h"
#include "gemm/sm80/product_sm80.h"
#include "gemm/sm90/job.h"

namespace kimi::gemm {
namespace {

bool is_wide(const Product& p, const StoreParams& out) {
  const int64_t size = size_of(out.dtype);
  return divides16(out.out, out.row_stride, size) &&
         divides16(out.bias, out.bias ? p.cols : 0, size_of(p.dtype)) &&
         (p.grouping == Grouping::kM || divides16(out.out, out.group_stride, size));
}

}  // namespace

Status is_hopper(const char* op, bool* hopper) {
  int sm = 0;
  KIMI_RETURN_IF_ERROR(device_sm(sm));
  *hopper = sm / 10 == 9;
  if (sm >= kMinSm) return Status::ok();
  return error(KIMI_UNSUPPORTED, op, ": device: expected compute capability ", kMinSm / 10, ".",
               kMinSm % 10, " or above, got ", sm / 10, ".", sm % 10);
}

Status product_cuda(const char* op, const Product& p, const StoreParams& params, void* stream) {
  if (p.grouping == Grouping::kBatch)
    return invalid(op, ": grouping: expected groups along M or K, got a batch");
  if (is_empty(p)) return Status::ok();
  StoreParams out = params;
  out.wide = is_wide(p, out);
  bool hopper = false;
  KIMI_RETURN_IF_ERROR(is_hopper(op, &hopper));
  if (hopper && sm90::serves(p)) return sm90::store(p, out, sm90::is_narrow(p), stream);
  sm80::Job job;
  KIMI_RETURN_IF_ERROR(sm80::make_job(op, p, std::nullopt, &job));
  return dispatch(p.dtype, [&]<class T>() { return sm80::store<T>(job, out, stream); });
}

}  // namespace kimi::gemm
