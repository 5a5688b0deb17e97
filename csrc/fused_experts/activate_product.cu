// SPDX-License-Identifier: MIT
// Which kernel takes a product that ends in an activation: forward the tiles of B are depth-major,
// backward outer-major.
#include "common/dtype.h"
#include "fused_experts/activate_product.h"
#include "gemm/sm90/job.h"

namespace kimi::experts {
namespace {

Major b_major(Pass pass) { return pass == Pass::kForward ? Major::kDepth : Major::kOuter; }

}  // namespace

bool serves_sm90(const gemm::Product& p, Pass pass) {
  return gemm::sm90::serves(p) && gemm::sm90::b_major(p) == b_major(pass);
}

Status activate_product(const gemm::Product& p, ActivateParams params, Pass pass, void* stream) {
  if (gemm::is_empty(p)) return Status::ok();
  const int64_t size = size_of(p.dtype);
  params.wide = gemm::divides16(params.gate_up, p.cols, size) &&
                gemm::divides16(params.grad_gate_up, p.cols, size) &&
                gemm::divides16(params.hidden, p.cols, size) &&
                gemm::divides16(params.bias, params.bias ? p.cols : 0, size);
  bool hopper = false;
  KIMI_RETURN_IF_ERROR(gemm::is_hopper("fused_experts", &hopper));
  if (hopper && serves_sm90(p, pass))
    return p.dtype == KIMI_BFLOAT16 ? activate_sm90<bf16>(p, params, pass, stream)
                                    : activate_sm90<fp16>(p, params, pass, stream);
  gemm::sm80::Job job;
  KIMI_RETURN_IF_ERROR(gemm::sm80::make_job("fused_experts", p, b_major(pass), &job));
  return dispatch(p.dtype, [&]<class T>() { return activate_sm80<T>(job, params, pass, stream); });
}

}  // namespace kimi::experts
